"""The Debian packages that the cluster is made of, installed when they are missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .console import run_quietly, say
from .settings import ClusterError, Settings

# Package -> a program (or a file) that it brings.
PACKAGES = {
    "buildah": "buildah",
    "containerd": "containerd",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "debootstrap": "debootstrap",
    "docker-registry": "docker-registry",
    "etcd-server": "etcd",
    "iproute2": "ip",
    "kmod": "modprobe",
    "nftables": "nft",
    "openssl": "openssl",
    "runc": "runc",
    "util-linux": "unshare",
}
ELSEWHERE = (
    "To use a cluster that exists instead: make demo CONTEXT=<kubectl context> "
    "REGISTRY=<registry that it can pull from>."
)


def missing_packages() -> list[str]:
    return [package for package, program in PACKAGES.items() if not _is_there(program)]


def require_root() -> None:
    """Raises: ClusterError unless this process may make bridges, mounts and namespaces."""
    if os.geteuid() != 0:
        raise ClusterError(
            "The local cluster needs root: it makes a bridge, mounts and namespaces. "
            f"Run the same command with sudo -E. {ELSEWHERE}"
        )


def ensure_packages(settings: Settings) -> None:
    """Install what is missing, by apt. Raises ClusterError with the remedy if it cannot."""
    missing = missing_packages()
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(
            f"The local cluster needs {', '.join(missing)} (names of Debian's packages), and this "
            f"machine has no apt-get to install them. {ELSEWHERE}"
        )
    say(f"    installing Debian packages: {' '.join(missing)}")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    # The packages' own services would take the ports and folders of ours.
    with _no_services_started():
        log = settings.cache / "logs" / "apt.log"
        update = ["apt-get", "update", "-q"]
        run_quietly("apt-get update", update, log, environment=environment)
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
        run_quietly("apt-get install", install, log, environment=environment)
    if still := missing_packages():
        raise ClusterError(f"apt-get installed no program of: {', '.join(still)}. {ELSEWHERE}")


class _no_services_started:
    """While it is entered, dpkg starts no service of a package that it installs."""

    policy = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.is_ours = not self.policy.exists()
        if self.is_ours:
            self.policy.write_text("#!/bin/sh\nexit 101\n")
            self.policy.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self.is_ours:
            self.policy.unlink(missing_ok=True)


def _is_there(program: str) -> bool:
    if program.startswith("/"):
        return Path(program).exists()
    return shutil.which(program) is not None
