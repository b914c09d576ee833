"""Where the cluster keeps its files, and the addresses and ports it uses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NODE_NAME = "pagoda-node"
BRIDGE = "pagoda0"
# The bridge has the pod network's first address. It is the node's address: not loopback, so pods
# reach the API server and the name service there, and nothing outside this machine does.
NODE_IP = "10.244.0.1"
POD_CIDR = "10.244.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
DNS_SERVICE_IP = "10.96.0.10"
DNS_DOMAIN = "cluster.local"
API_PORT = 6443
ETCD_PORT = 23790
REGISTRY = "127.0.0.1:5000"
NFT_TABLE = "pagoda-cluster"


class ClusterError(Exception):
    """Something the user has to know: what is wrong, and what helps."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The two folders: `state` lives as long as the cluster does, `cache` outlives it.

    api_ip, api_port, etcd_port: where the API server and its store (on loopback) listen; the port
    after the store's is its own too.
    """

    state: Path
    cache: Path
    api_ip: str = NODE_IP
    api_port: int = API_PORT
    etcd_port: int = ETCD_PORT

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Settings:
        home = Path(environment.get("HOME") or Path.home())
        cache = Path(environment.get("PAGODA_CACHE") or home / ".cache" / "pagoda")
        # A short path, because the names of unix sockets end after 107 bytes.
        state = Path(environment.get("PAGODA_CLUSTER_DIR") or "/var/lib/pagoda-cluster")
        return Settings(state.absolute(), cache.absolute() / "cluster")

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.state / "audit.log"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def pids(self) -> Path:
        return self.state / "pids"

    @property
    def bin(self) -> Path:
        return self.cache / "bin"

    @property
    def cgroup(self) -> str:
        """The control group of all pods; another cluster folder has another."""
        return f"pagoda-{hashlib.sha256(str(self.state).encode()).hexdigest()[:8]}"

    @property
    def containerd_socket(self) -> Path:
        return self.state / "containerd" / "containerd.sock"


def environment_settings() -> Settings:
    return Settings.from_environment(os.environ)
