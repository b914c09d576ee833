"""containerd's store, which outlives the cluster, and the one image that the node itself needs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from . import components, node
from .console import output_of
from .processes import ProcessId, start, stop
from .settings import REGISTRY, ClusterError, Settings

NAMESPACE = "k8s.io"
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
OCI_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
REGISTRY_SECONDS = 20.0
REPOSITORIES = Path("docker/registry/v2/repositories")
KEPT_TAGS = 8


def forget_containers(settings: Settings) -> None:
    """Remove the records and snapshots of containers from the store; images stay.

    The next cluster knows none of these pods, and containerd would try to bring them back. The
    store is opened without its Kubernetes part, which would hold on to them.
    """
    if not (settings.config / "containerd-store.toml").exists():
        return
    if not (settings.cache / "containerd").exists():
        return
    # What a killed containerd leaves there, its socket above all, would be taken for a running one.
    shutil.rmtree(settings.state / "containerd", ignore_errors=True)
    inside = node.start_node(settings)
    try:
        start(settings, components.containerd(settings, with_pods=False), inside)
        _wait_for_store(settings, inside)
        names = _ctr(settings, inside, "containers", "list", "--quiet").split()
        if names:
            _ctr(settings, inside, "containers", "delete", *names)
        images = _ctr(settings, inside, "images", "list")
        if old := superseded_images(images, _tags_of_registry(settings)):
            _ctr(settings, inside, "images", "delete", *old)
        stop(settings, "containerd")
    finally:
        node.stop_node(settings)


def superseded_images(listing: str, tagged: set[str]) -> list[str]:
    """Names of Pagoda's images in containerd's store that the registry has no tag for any more.

    Args:
        listing: lines `NAME TYPE DIGEST …` after a heading. An image has several names.
        tagged: references that the registry still holds.
    """
    lines = [line.split()[:3] for line in listing.splitlines()[1:]]
    ours = {digest for name, _, digest in lines if name.startswith(f"{REGISTRY}/pagoda-")}
    wanted = {digest for name, _, digest in lines if name in tagged}
    return [name for name, _, digest in lines if digest in ours - wanted]


def _tags_of_registry(settings: Settings) -> set[str]:
    repositories = settings.cache / "registry" / REPOSITORIES
    return {
        f"{REGISTRY}/{tag.parents[2].name}:{tag.name}"
        for tag in repositories.glob("*/_manifests/tags/*")
    }


def prune_registry(settings: Settings, repository: str) -> None:
    """Drop all but the newest tags of a repository, and the blobs that no tag holds any more."""
    tags = settings.cache / "registry" / REPOSITORIES / repository / "_manifests" / "tags"
    newest_first = sorted(tags.iterdir(), key=lambda tag: tag.stat().st_mtime, reverse=True)
    for tag in newest_first[KEPT_TAGS:]:
        shutil.rmtree(tag)
    if len(newest_first) > KEPT_TAGS:
        config = str(settings.config / "registry.json")
        output_of("docker-registry", "garbage-collect", "--delete-untagged", config)


def answers(settings: Settings, inside: ProcessId) -> bool:
    """Whether containerd does; its socket is there before it does, and refuses what comes early."""
    try:
        return settings.containerd_socket.exists() and bool(_ctr(settings, inside, "version"))
    except ClusterError:
        return False


def _wait_for_store(settings: Settings, inside: ProcessId) -> None:
    deadline = time.monotonic() + 30
    while not answers(settings, inside):
        if time.monotonic() > deadline:
            raise ClusterError("containerd's store did not open within 30 s; another is using it.")
        time.sleep(0.05)


def _ctr(settings: Settings, inside: ProcessId, *arguments: str) -> str:
    address = f"--address={settings.containerd_socket}"
    command = ["ctr", address, f"--namespace={NAMESPACE}", *arguments]
    return node.run_inside(inside, *command)


def push_pause_image(settings: Settings) -> None:
    """Put the image that holds a pod's namespaces into the registry: one static program.

    Made here by hand, without a build tool, because nothing runs on the node before it is there.
    """
    binary = (settings.bin / "pause").read_bytes()
    layer, diff_id = _layer("pause", binary)
    config = json.dumps(
        {
            "architecture": _architecture(),
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created_by": "pause"}],
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor(CONFIG_TYPE, config),
            "layers": [_descriptor(LAYER_TYPE, layer)],
        }
    ).encode()
    wait_for_registry()
    for blob in (layer, config):
        _push_blob("pause", blob)
    _request("PUT", "/v2/pause/manifests/pagoda", manifest, MANIFEST_TYPE)


def _layer(name: str, content: bytes) -> tuple[bytes, str]:
    """A compressed layer with one executable file, and the digest of what is in it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o755
        archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), compresslevel=1, mtime=0), _digest(raw.getvalue())


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "size": len(content), "digest": _digest(content)}


def _architecture() -> str:
    machine = output_of("uname", "-m").strip()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def wait_for_registry() -> None:
    """Raises: ClusterError if the local registry does not come up."""
    deadline = time.monotonic() + REGISTRY_SECONDS
    while True:
        try:
            _request("GET", "/v2/")
            return
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _push_blob(repository: str, blob: bytes) -> None:
    digest = _digest(blob)
    try:
        _request("HEAD", f"/v2/{repository}/blobs/{digest}")
        return
    except ClusterError:
        pass  # not there yet
    place = _request("POST", f"/v2/{repository}/blobs/uploads/", b"")
    separator = "&" if "?" in place else "?"
    _request("PUT", f"{place}{separator}digest={digest}", blob, "application/octet-stream")


def _request(method: str, url: str, body: bytes | None = None, media_type: str = "") -> str:
    """One request to the local registry; returns the Location it answers with, if any."""
    if url.startswith("/"):
        url = f"http://{REGISTRY}{url}"
    request = urllib.request.Request(url, data=body, method=method)
    # Without it the registry says that an image of the OCI's format is not there.
    request.add_header("Accept", f"{MANIFEST_TYPE}, {OCI_MANIFEST_TYPE}")
    if media_type:
        request.add_header("Content-Type", media_type)
    # The machine's proxy settings are not for this registry.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.headers.get("Location") or ""
    except (urllib.error.URLError, OSError) as error:
        raise ClusterError(f"the local registry at {REGISTRY}: {method}: {error}") from error


def has_image(repository: str, tag: str) -> bool:
    """Whether the local registry holds that image."""
    try:
        _request("HEAD", f"/v2/{repository}/manifests/{tag}")
    except ClusterError:
        return False
    return True
