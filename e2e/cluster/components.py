"""The command line of every process of the cluster, in the order in which they start."""

from __future__ import annotations

from .processes import Program
from .settings import (
    NODE_IP,
    NODE_NAME,
    POD_CIDR,
    SERVICE_CIDR,
    Settings,
)


def etcd(settings: Settings) -> Program:
    address = f"http://127.0.0.1:{settings.etcd_port}"
    peers = f"http://127.0.0.1:{settings.etcd_port + 1}"
    flags = {
        "name": "pagoda",
        "data-dir": settings.state / "etcd",
        "listen-client-urls": address,
        "advertise-client-urls": address,
        "listen-peer-urls": peers,
        "initial-advertise-peer-urls": peers,
        "initial-cluster": f"pagoda={peers}",
        "logger": "zap",
        "log-level": "warn",
    }
    # The cluster ends with its data, so nothing is won by waiting for the disk.
    return Program("etcd", ["etcd", *_flags(flags), "--unsafe-no-fsync"])


def api_server(settings: Settings) -> Program:
    pki = settings.pki
    flags = {
        "advertise-address": settings.api_ip,
        "bind-address": settings.api_ip,
        "secure-port": settings.api_port,
        "etcd-servers": f"http://127.0.0.1:{settings.etcd_port}",
        "service-cluster-ip-range": SERVICE_CIDR,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "client-ca-file": pki / "ca.crt",
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "kubelet-client-certificate": pki / "apiserver-to-kubelet.crt",
        "kubelet-client-key": pki / "apiserver-to-kubelet.key",
        "kubelet-certificate-authority": pki / "ca.crt",
        # The node's name is in no name service.
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": pki / "service-account.key",
        "service-account-signing-key-file": pki / "service-account.key",
        "requestheader-client-ca-file": pki / "ca.crt",
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-username-headers": "X-Remote-User",
        "proxy-client-cert-file": pki / "front-proxy.crt",
        "proxy-client-key-file": pki / "front-proxy.key",
        "enable-aggregator-routing": "true",
        # Debian's etcd does not tell how far a watch is: those that begin with a list would be
        # broken off.
        "feature-gates": "WatchList=false",
        "audit-policy-file": settings.config / "audit-policy.json",
        "audit-log-path": settings.audit_log,
        "audit-log-maxsize": 1000,
        "cert-dir": settings.state / "apiserver",
        "v": 1,
    }
    return Program("kube-apiserver", [_kube(settings, "kube-apiserver"), *_flags(flags)])


def controller_manager(settings: Settings) -> Program:
    config = settings.config / "controller-manager.kubeconfig"
    flags = {
        "kubeconfig": config,
        "authentication-kubeconfig": config,
        "authorization-kubeconfig": config,
        "secure-port": 0,
        "cluster-cidr": POD_CIDR,
        "service-cluster-ip-range": SERVICE_CIDR,
        "allocate-node-cidrs": "false",
        "use-service-account-credentials": "true",
        "root-ca-file": settings.pki / "ca.crt",
        "service-account-private-key-file": settings.pki / "service-account.key",
        "cluster-signing-cert-file": settings.pki / "ca.crt",
        "cluster-signing-key-file": settings.pki / "ca.key",
        "leader-elect": "false",
        # Nodes that tests make up have no kubelet that says again and again that they are ready.
        "node-monitor-grace-period": "10m",
        "v": 1,
    }
    program = _kube(settings, "kube-controller-manager")
    return Program("kube-controller-manager", [program, *_flags(flags)])


def scheduler(settings: Settings) -> Program:
    config = settings.config / "scheduler.kubeconfig"
    flags = {
        "config": settings.config / "scheduler.json",
        "authentication-kubeconfig": config,
        "authorization-kubeconfig": config,
        "secure-port": 0,
        "v": 1,
    }
    return Program("kube-scheduler", [_kube(settings, "kube-scheduler"), *_flags(flags)])


def containerd(settings: Settings, *, with_pods: bool = True) -> Program:
    file = "containerd.toml" if with_pods else "containerd-store.toml"
    command = ["containerd", "--config", str(settings.config / file), "--log-level", "warn"]
    return Program("containerd", command, in_node=True)


def kubelet(settings: Settings) -> Program:
    flags = {
        "config": settings.config / "kubelet.json",
        "kubeconfig": settings.config / "kubelet.kubeconfig",
        "root-dir": settings.state / "kubelet",
        "cert-dir": settings.state / "kubelet" / "pki",
        "hostname-override": NODE_NAME,
        "node-ip": NODE_IP,
        "node-labels": "pagoda.dev/local-cluster=true",
        "v": 1,
    }
    command = [_kube(settings, "kubelet"), *_flags(flags)]
    return Program("kubelet", command, in_node=True)


def kube_proxy(settings: Settings) -> Program:
    flags = {
        "config": settings.config / "kube-proxy.json",
        "hostname-override": NODE_NAME,
        "v": 1,
    }
    return Program("kube-proxy", [_kube(settings, "kube-proxy"), *_flags(flags)])


def coredns(settings: Settings) -> Program:
    command = [str(settings.bin / "coredns"), "-conf", str(settings.config / "Corefile")]
    return Program("coredns", command)


def registry(settings: Settings) -> Program:
    command = ["docker-registry", "serve", str(settings.config / "registry.json")]
    # It would look for a tracing collector otherwise.
    return Program("registry", command, {"OTEL_TRACES_EXPORTER": "none"})


def _kube(settings: Settings, program: str) -> str:
    return str(settings.bin / program)


def _flags(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]
