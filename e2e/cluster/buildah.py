"""buildah with all its files under the cache folder."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import mount_points
from .console import run_quietly
from .settings import ClusterError

# Where buildah keeps things whatever it is told; seen by it, they are folders of ours.
PRIVATE_FOLDERS = ("/var/lib/containers", "/run/containers", "/var/tmp")
CERTIFICATES = "/etc/ssl/certs"


def verify_place(cache: Path) -> None:
    """Raises: ClusterError: the cache lies where buildah would not see it."""
    for place in PRIVATE_FOLDERS:
        if cache.is_relative_to(place):
            raise ClusterError(
                f"The cache folder {cache} lies in {place}, which is another folder while images "
                "are built. Set PAGODA_CACHE to a folder elsewhere."
            )


@dataclass(frozen=True, slots=True)
class Buildah:
    """Builds and pushes with a store in `cache`/buildah that is kept between runs."""

    cache: Path

    @property
    def folder(self) -> Path:
        return self.cache / "buildah"

    @property
    def mount_points(self) -> Path:
        return self.cache / "buildah-mount-points"

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs buildah in a mount namespace with folders of ours.

        No mount of it outlives it, even if it is killed.
        """
        script = ["set -e"]
        for place in PRIVATE_FOLDERS:
            own = self.folder / place.strip("/").replace("/", "-")
            own.mkdir(parents=True, exist_ok=True)
            script += [f"mount --bind {shlex.quote(str(own))} {place}"]
            mount_points.make(Path(place), self.mount_points)
        script += ['exec nice "$@"']
        unshare = ["unshare", "--mount", "--propagation", "private"]
        return [*unshare, "sh", "-c", "\n".join(script), "sh", "buildah", *arguments]

    def environment(self) -> dict[str, str]:
        return dict(os.environ, STORAGE_DRIVER="overlay", BUILDAH_ISOLATION="chroot")

    def output(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ClusterError(f"buildah {arguments[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        try:
            self.output("inspect", "--type", "image", image)
        except ClusterError:
            return False
        return True

    def build(self, target: str, base: str, context: Path, reference: str, log: Path) -> None:
        command = self.command(
            *("bud", "--layers", "--network", "host", "--pull-never", "--target", target),
            *("--build-arg", f"BASE={base}", "--tag", reference),
            # A machine behind a proxy of its own has its authority in there.
            *("--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"),
            *("--file", str(context / "Containerfile"), str(context)),
        )
        run_quietly(f"building {target}", command, log, environment=self.environment())

    def push(self, reference: str, log: Path) -> None:
        """Push an image; zstd's fastest level makes both push and pull shortest."""
        packing = ("--compression-format", "zstd", "--compression-level", "1")
        is_here = reference.startswith(("127.0.0.1:", "localhost:"))
        verify = f"--tls-verify={'false' if is_here else 'true'}"
        command = self.command("push", verify, *packing, reference)
        run_quietly(f"pushing {reference}", command, log, environment=self.environment())

    def forget_others(self, repository: str, *, keep: str) -> None:
        """Untag older builds; the layers that the kept one shares with them stay."""
        names = self.output("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()
        old = [name for name in names if name.startswith(f"{repository}:") and name != keep]
        if old:
            self.output("rmi", *old)
