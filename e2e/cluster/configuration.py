"""The configuration files of the cluster's programs: pure functions, JSON where YAML is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import network
from .settings import (
    DNS_DOMAIN,
    DNS_SERVICE_IP,
    NODE_IP,
    POD_CIDR,
    REGISTRY,
    Settings,
)

PAUSE_IMAGE = f"{REGISTRY}/pause:pagoda"


def write_all(settings: Settings) -> None:
    settings.config.mkdir(parents=True, exist_ok=True)
    cni = settings.config / "cni"
    cni.mkdir(exist_ok=True)
    files = {
        "cni/10-pagoda.conflist": network.cni_configuration(settings),
        "audit-policy.json": json.dumps(audit_policy()),
        "kubelet.json": json.dumps(kubelet(settings), indent=2),
        "kube-proxy.json": json.dumps(kube_proxy(settings), indent=2),
        "scheduler.json": json.dumps(scheduler(settings), indent=2),
        "containerd.toml": containerd(settings, with_pods=True),
        "containerd-store.toml": containerd(settings, with_pods=False),
        "registry.json": json.dumps(registry(settings.cache / "registry"), indent=2),
        "Corefile": corefile(settings),
    }
    for name, text in files.items():
        (settings.config / name).write_text(text)


def audit_policy() -> dict[str, Any]:
    """Every write with who made it and of what, once it is answered; reads of what was installed.

    What was installed asks by a service account of its own, as the cluster's own controllers do.
    """
    writes = ["create", "update", "patch", "delete", "deletecollection"]
    installed = {"level": "Metadata", "userGroups": ["system:serviceaccounts"]}
    controllers = {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]}
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "Metadata", "verbs": writes},
            controllers,
            installed,
            {"level": "None"},
        ],
    }


def kubelet(settings: Settings) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_IP,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(settings.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(settings.pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(settings.pki / "kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{settings.containerd_socket}",
        "clusterDNS": [DNS_SERVICE_IP],
        "clusterDomain": DNS_DOMAIN,
        "resolvConf": "/etc/resolv.conf",
        "podLogsDir": str(settings.state / "pod-logs"),
        "volumePluginDir": str(settings.state / "volume-plugins"),
        "staticPodPath": "",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{settings.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        # Its iptables chains would outlive the cluster, and nothing here needs them.
        "makeIPTablesUtilChains": False,
        # Absolute sizes: on a large shared disk a percentage reads as full while gigabytes are
        # free, and kubelet would delete the images, the sandbox's first.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1Gi",
            "imagefs.available": "1Gi",
            "nodefs.inodesFree": "1%",
            "imagefs.inodesFree": "1%",
        },
        "registerWithTaints": [],
        "maxPods": 110,
        # What the demo and the tests wait for is ready seconds earlier with fast reports.
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "10s",
        # How soon an emptyDir over its limit is noticed.
        "volumeStatsAggPeriod": "10s",
        "registryPullQPS": 0,
        "serializeImagePulls": False,
        "shutdownGracePeriod": "0s",
    }


def kube_proxy(settings: Settings) -> dict[str, Any]:
    leave_as_it_is = {
        "maxPerCore": 0,
        "min": 0,
        "tcpEstablishedTimeout": "0s",
        "tcpCloseWaitTimeout": "0s",
    }
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": POD_CIDR,
        "bindAddress": NODE_IP,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "clientConnection": {"kubeconfig": str(settings.config / "proxy.kubeconfig")},
        # A pod that calls a Service whose pod is on the same bridge would get the answer past the
        # address translation.
        "nftables": {"masqueradeAll": True, "minSyncPeriod": "100ms", "syncPeriod": "30s"},
        "conntrack": leave_as_it_is,
        "nodePortAddresses": ["primary"],
    }


def scheduler(settings: Settings) -> dict[str, Any]:
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"kubeconfig": str(settings.config / "scheduler.kubeconfig")},
    }


def containerd(settings: Settings, *, with_pods: bool) -> str:
    """containerd's TOML; `with_pods=False` is the bare store, for clearing up after a crash."""
    text = f"""version = 2
root = "{settings.cache / "containerd"}"
state = "{settings.state / "containerd"}"
disabled_plugins = {json.dumps(_disabled_plugins(with_pods))}

[grpc]
address = "{settings.containerd_socket}"
"""
    if not with_pods:
        return text
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""{text}
[{cri}]
sandbox_image = "{PAUSE_IMAGE}"
stream_server_address = "127.0.0.1"
netns_mounts_under_state_dir = true
{_oom_score_line()}
[{cri}.cni]
bin_dir = "{network.cni_bin_folder()}"
conf_dir = "{settings.config / "cni"}"

[{cri}.containerd]
default_runtime_name = "runc"

[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
Root = "{settings.state / "runc"}"
"""


def _oom_score_line() -> str:
    # Where the machine lacks CAP_SYS_RESOURCE, lowering the score fails, and every pod with it.
    return "restrict_oom_score_adj = true\n"


def _disabled_plugins(with_pods: bool) -> list[str]:
    snapshotters = ("aufs", "btrfs", "devmapper", "zfs", "native")
    plugins = [f"io.containerd.snapshotter.v1.{name}" for name in snapshotters]
    return plugins if with_pods else [*plugins, "io.containerd.grpc.v1.cri"]


def registry(blobs: Path) -> dict[str, Any]:
    return {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(blobs)}, "delete": {"enabled": True}},
        "http": {"addr": REGISTRY},
    }


def corefile(settings: Settings) -> str:
    """Names of Services from the API server; every other name from the machine's own resolver."""
    return f""".:53 {{
    bind {NODE_IP}
    errors
    health 127.0.0.1:10253
    ready 127.0.0.1:10254
    kubernetes {DNS_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {settings.config / "coredns.kubeconfig"}
        pods insecure
        ttl 5
    }}
    forward . /etc/resolv.conf
    cache 5
    loadbalance
}}
"""
