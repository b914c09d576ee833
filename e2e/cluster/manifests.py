"""The objects that the cluster itself needs, as values."""

from __future__ import annotations

from typing import Any

from .settings import DNS_SERVICE_IP, NODE_IP

Manifest = dict[str, Any]
DNS_PORTS = (("dns", 53, "UDP"), ("dns-tcp", 53, "TCP"))


def system_objects() -> Manifest:
    """The name service's rights and its Service; it is a process of this machine, not a pod."""
    items = [_dns_role(), _dns_binding(), _dns_service(), _dns_endpoints()]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _dns_role() -> Manifest:
    verbs = ["list", "watch"]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": verbs},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
        ],
    }


def _dns_binding() -> Manifest:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "system:coredns"}],
    }


def _dns_service() -> Manifest:
    ports = [
        {"name": name, "port": port, "protocol": protocol} for name, port, protocol in DNS_PORTS
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns"},
        },
        "spec": {"clusterIP": DNS_SERVICE_IP, "ports": ports},
    }


def _dns_endpoints() -> Manifest:
    ports = [
        {"name": name, "port": port, "protocol": protocol} for name, port, protocol in DNS_PORTS
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
    }
