"""The image that Pagoda's are built upon, made from the machine's own Debian mirror."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from .buildah import Buildah
from .console import phase, run_quietly
from .settings import ClusterError, Settings

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
# The Containerfile's own default.
PUBLIC = "debian:bookworm-slim"
REPOSITORY = "localhost/pagoda-base"


def ensure_base(settings: Settings, buildah: Buildah) -> str:
    """The name of a base image in buildah's store; made by debootstrap if it is not there.

    Without a Debian mirror in apt's sources it is the public image, pulled.
    """
    mirror = debian_mirror()
    if mirror is None:
        if not buildah.has(PUBLIC):
            with phase("pull the base image"):
                log = settings.cache / "logs" / "base.log"
                command = buildah.command("pull", PUBLIC)
                run_quietly("pulling", command, log, environment=buildah.environment())
        return PUBLIC
    name = f"{REPOSITORY}:{base_key()}"
    if not buildah.has(name):
        with phase("base image"):
            _debootstrap(settings, buildah, mirror, name)
    return name


def base_key() -> str:
    text = " ".join((SUITE, *PACKAGES))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def debian_mirror() -> str | None:
    """The mirror of Debian's releases that apt uses on this machine; None if it uses none."""
    if not shutil.which("apt-get"):
        return None
    done = subprocess.run(
        [
            *("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(LABEL)"),
            *("Created-By: Packages", "Origin: Debian"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return pick_mirror(done.stdout)


def pick_mirror(targets: str) -> str | None:
    """From lines `SITE RELEASE LABEL`: security updates come from other places than releases."""
    for line in targets.splitlines():
        site, _, rest = line.partition(" ")
        release, _, label = rest.partition(" ")
        is_addition = any(word in release for word in ("security", "updates", "backports"))
        if label.strip() == "Debian" and not is_addition:
            return site
    return None


def _debootstrap(settings: Settings, buildah: Buildah, mirror: str, name: str) -> None:
    logs = settings.cache / "logs"
    settings.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.cache, prefix="base-") as temporary:
        root = Path(temporary) / "root"
        include = f"--include={','.join(PACKAGES)}"
        command = ["debootstrap", "--variant=minbase", include, SUITE, str(root), mirror]
        # In a mount namespace: what it mounts goes with it, even if it is killed.
        unshare = ["unshare", "--mount", "--propagation", "private", "nice"]
        run_quietly("debootstrap", [*unshare, *command], logs / "base.log")
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / folder, ignore_errors=True)
        archive = Path(temporary) / "root.tar"
        tar = ["tar", "--create", "--one-file-system", f"--directory={root}", f"--file={archive}"]
        run_quietly("packing the base image", [*tar, "."], logs / "base-tar.log")
        container = buildah.output("from", "scratch")
        try:
            buildah.output("add", container, str(archive), "/")
            buildah.output("config", "--cmd", "/bin/bash", container)
            buildah.output("commit", container, name)
        finally:
            buildah.output("rm", container)
    if not buildah.has(name):
        raise ClusterError(f"buildah did not keep {name}.")
