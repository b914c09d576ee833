"""Pagoda's images: built from the one Containerfile, tagged by content, pushed where pods pull.

from cluster.images import ensure_images
ensure_images(settings)  # {"runtime": "127.0.0.1:5000/pagoda-runtime:…", "operator": …}
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import store
from .base_image import ensure_base
from .buildah import Buildah
from .console import phase, run_quietly
from .packages import require_root
from .processes import running
from .settings import REGISTRY, ROOT, ClusterError, Settings

# What every image is made from, beside its own requirements and code.
SHARED = (
    "Containerfile",
    "pyproject.toml",
    "e2e/cluster/image/dependencies.sh",
    "e2e/cluster/image/install.py",
)
FIXED_TIME = 1_600_000_000


@dataclass(frozen=True, slots=True)
class Image:
    """A target of the Containerfile, and the files of the repository that it copies."""

    target: str
    paths: tuple[str, ...]

    @property
    def repository(self) -> str:
        return f"pagoda-{self.target}"

    def files(self, root: Path) -> list[Path]:
        """Relative paths of all that goes in, in a fixed order."""
        found: set[Path] = set()
        for name in (*SHARED, *self.paths):
            path = root / name
            inside = path.rglob("*") if path.is_dir() else [path]
            found.update(file.relative_to(root) for file in inside if _is_content(file))
        return sorted(found)

    def tag(self, root: Path) -> str:
        return content_tag(root, self.files(root))


# The small one first: it is wanted first.
IMAGES = (
    Image("operator", ("requirements/operator.txt", "operator/pagoda_operator")),
    Image(
        "runtime",
        ("requirements/runtime.txt", "kernels/pagoda_kernels", "runtime/pagoda_runtime"),
    ),
)


def _is_content(path: Path) -> bool:
    return path.is_file() and not {"__pycache__", "compiled_ahead"} & set(path.parts)


def content_tag(root: Path, files: Iterable[Path]) -> str:
    """The same for the same names and contents, wherever the checkout lies and whenever it was."""
    digest = hashlib.sha256()
    for file in files:
        content = (root / file).read_bytes()
        digest.update(f"{file.as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def ensure_images(
    settings: Settings, registry: str | None = None, tag: str | None = None
) -> dict[str, str]:
    """Build and push what the registry lacks; returns target -> reference.

    Args:
        registry: another registry than the local one; then docker or podman build as well.
        tag: of the images there; by default one for each, by its content.
    Raises: ClusterError if there is no tool to build with, or it fails.
    """
    if registry is None:
        require_root()
        if running(settings, "registry") is None:
            raise ClusterError("The local registry is not up: python3 e2e/cluster up")
        return {image.target: _ensure_local(settings, image) for image in IMAGES}
    tool = _engine()
    if tool == "buildah":
        require_root()
        return {image.target: _with_buildah(settings, image, registry, tag) for image in IMAGES}
    return {image.target: _push_elsewhere(settings, image, registry, tag, tool) for image in IMAGES}


def _ensure_local(settings: Settings, image: Image) -> str:
    tag = image.tag(ROOT)
    if store.has_image(image.repository, tag):
        return f"{REGISTRY}/{image.repository}:{tag}"
    reference = _with_buildah(settings, image, REGISTRY)
    store.prune_registry(settings, image.repository)
    return reference


def _with_buildah(settings: Settings, image: Image, registry: str, tag: str | None = None) -> str:
    """With a base made from Debian's packages, where no public one can be pulled."""
    repository = f"{registry.rstrip('/')}/{image.repository}"
    reference = f"{repository}:{tag or image.tag(ROOT)}"
    buildah = Buildah(settings.cache)
    base = ensure_base(settings, buildah)
    context = stage(settings, image)
    with phase(f"build {image.repository}"):
        log = settings.cache / "logs" / f"image-{image.target}.log"
        buildah.build(image.target, base, context, reference, log)
    with phase(f"push {image.repository}"):
        buildah.push(reference, settings.cache / "logs" / f"push-{image.target}.log")
    if tag is None:
        buildah.forget_others(repository, keep=reference)
    return reference


def stage(settings: Settings, image: Image) -> Path:
    """Copy what goes in to a folder of its own: an edit meanwhile cannot make image and tag differ.

    Times and modes are fixed, so that equal content makes equal layers.
    """
    folder = settings.cache / "context" / image.target
    shutil.rmtree(folder, ignore_errors=True)
    for file in image.files(ROOT):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / file).read_bytes())
        target.chmod(0o644)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (FIXED_TIME, FIXED_TIME))
    return folder


def _engine() -> str:
    """A tool on this machine that builds and pushes images."""
    for tool in ("docker", "podman", "buildah"):
        if shutil.which(tool) and _answers(tool):
            return tool
    raise ClusterError(
        "Building images for another registry needs docker (with a daemon that answers), podman "
        "or buildah on this machine; there is none of them."
    )


def _answers(tool: str) -> bool:
    """docker's client is often there without its daemon."""
    return subprocess.run([tool, "info"], capture_output=True, check=False).returncode == 0


def _push_elsewhere(
    settings: Settings, image: Image, registry: str, tag: str | None, tool: str
) -> str:
    reference = f"{registry.rstrip('/')}/{image.repository}:{tag or image.tag(ROOT)}"
    context = stage(settings, image)
    logs = settings.cache / "logs"
    build: Sequence[str] = [
        *(tool, "build", "--target", image.target, "--tag", reference),
        *("--file", str(context / "Containerfile"), str(context)),
    ]
    environment = dict(os.environ, DOCKER_BUILDKIT="1")
    with phase(f"build {image.repository} ({tool})"):
        log = logs / f"image-{image.target}.log"
        run_quietly(f"building {image.repository}", build, log, environment=environment)
    with phase(f"push {image.repository} ({tool})"):
        push = [tool, "push", reference]
        run_quietly(f"pushing {image.repository}", push, logs / f"push-{image.target}.log")
    return reference
