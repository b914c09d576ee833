"""Fetch a model from a registry: an artifact whose layers are files, or archives of files.

As `oras push`, ModelPack's tools and image builders make them. Everything is checked against its
digest. What one manifest names lies in one folder, so that revisions stand beside each other.
Source: OCI Distribution Specification 1.1; Docker's token authentication.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urlencode

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.download import (
    ATTEMPTS,
    BROKEN,
    PIECE_BYTES,
    OnProgress,
    Progress,
    cache_folder,
    describe_failure,
    is_away,
    lock,
    open_url,
    pause_seconds,
)

AUTH_VARIABLE = "DOCKER_AUTH_CONFIG"
PLAIN_HTTP_VARIABLE = "PAGODA_OCI_PLAIN_HTTP"
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# What names the file of a layer; without one, a layer is an archive.
_TITLES = ("org.opencontainers.image.title", "org.cncf.model.filepath")
_UNPACK = "io.deis.oras.content.unpack"
MAX_ANSWER_BYTES = 4 << 20
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_REFERENCE = re.compile(
    r"oci://(?P<host>[^/@]+)/(?P<name>[a-z0-9._/-]+?)(?P<tag>:[\w][\w.-]*)?(?P<digest>@sha256:[0-9a-f]{64})?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(slots=True)
class _Repository:
    """One repository of one registry, and what it lets us in with."""

    url: str
    name: str
    login: str | None
    """User and password in base64."""
    authorization: str | None = field(default=None, init=False)

    def open(self, path: str, headers: Mapping[str, str]) -> HTTPResponse:
        """GET below the repository; asked for it, say who asks. Raises: OSError."""
        try:
            return self._open(path, headers)
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code != 401 or not challenge:
                raise
            before, self.authorization = self.authorization, self._answer(challenge)
            if self.authorization in (None, before):
                raise
        return self._open(path, headers)

    def _open(self, path: str, headers: Mapping[str, str]) -> HTTPResponse:
        request = urllib.request.Request(f"{self.url}/v2/{self.name}/{path}", headers=dict(headers))
        if self.authorization:
            # Not for the store to which a redirect leads: the address there holds its own key.
            request.add_unredirected_header("Authorization", self.authorization)
        return open_url(request)

    def _answer(self, challenge: str) -> str | None:
        """What to say to a registry that asks who we are."""
        basic = f"Basic {self.login}" if self.login else None
        if not challenge.lower().startswith("bearer "):
            return basic
        asked = dict(_CHALLENGE.findall(challenge))
        realm = asked.get("realm", "")
        # A password goes over no plainer line than the registry's own, and to no other scheme.
        if not realm.startswith(("https://", f"{self.url.partition('://')[0]}://")):
            raise ValueError(f"its registry sends us to {realm!r}")
        query = {"scope": f"repository:{self.name}:pull", "service": asked.get("service", "")}
        request = urllib.request.Request(f"{realm}?{urlencode(query)}")
        if basic:
            request.add_unredirected_header("Authorization", basic)
        with open_url(request) as answer:
            found = json.loads(answer.read(MAX_ANSWER_BYTES))
        return f"Bearer {found.get('token') or found.get('access_token')}"


def fetch_artifact(uri: str, revision: str | None, on_progress: OnProgress) -> Path:
    """The folder of a model, below PAGODA_CACHE or ~/.cache/pagoda.

    Where the registry cannot be reached, what the tag named when it was fetched last is used.

    Args:
        uri: oci://HOST/REPOSITORY, with or without :TAG or @DIGEST. Who asks is said by the
            variable DOCKER_AUTH_CONFIG, which has what Docker's config.json has.
        revision: tag or digest; None: that of `uri`, or `latest`.
    Raises: FatalError: ModelNotFound, ModelAccessDenied, CorruptWeights, SourceUnreachable,
        InvalidFlags or DiskFull.
    """
    host, name, reference = _parse(uri, revision)
    plain = os.environ.get(PLAIN_HTTP_VARIABLE, "").split(",")
    scheme = "http" if _LOOPBACK.fullmatch(host) or host in plain else "https"
    where = {"docker.io": "registry-1.docker.io"}.get(host, host)
    repository = _Repository(f"{scheme}://{where}", name, _login(host, os.environ))
    base = cache_folder() / "oci" / _short(f"{host}/{name}")
    note = base / f"{_short(reference)}.tag"
    on_progress("download", 0.0, 0.0)
    try:
        base.mkdir(parents=True, exist_ok=True)
        with lock(base / "lock"):
            try:
                folder = _fetch(repository, reference, base, Progress(on_progress))
                note.write_text(folder.name)
            except (OSError, http.client.HTTPException) as error:
                if not (is_away(error) and note.exists()):
                    raise
                folder = base / note.read_text()
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise describe_failure(uri, base, error) from error
        text = f"{uri}: the registry has no {reference}. Check model.uri and model.revision."
        raise FatalError("ModelNotFound", text) from error
    except (OSError, http.client.HTTPException) as error:
        raise describe_failure(uri, base, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, tarfile.TarError) as error:
        text = f"{uri} ({reference}) is no artifact with a model's files as its layers: {error!r}."
        raise FatalError("CorruptWeights", text) from error
    on_progress("download", 100.0, 0.0)
    config = min(folder.rglob("config.json"), key=lambda path: len(path.parts), default=None)
    if config is None:
        raise FatalError("ModelNotFound", f"{uri} ({reference}) has no config.json.")
    return config.parent


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _parse(uri: str, revision: str | None) -> tuple[str, str, str]:
    """Registry, repository, and tag or digest."""
    found = _REFERENCE.fullmatch(uri)
    if found is None:
        text = f"{uri!r} is no model of a registry; it must look like oci://host/repository:tag."
        raise FatalError("ModelNotFound", text)
    own = (found["digest"] or found["tag"] or "")[1:]
    if own and revision is not None:
        text = f"--revision (model.revision) is {revision}, but {uri} names a tag or digest itself."
        raise FatalError("InvalidFlags", text)
    return found["host"], found["name"], revision or own or "latest"


def _login(host: str, environment: Mapping[str, str]) -> str | None:
    """User and password for a registry in base64, as Docker's config.json has them.

    Raises: FatalError: InvalidFlags, the variable holds something else.
    """
    text = environment.get(AUTH_VARIABLE)
    if not text:
        return None
    names = [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    if host == "docker.io":
        names.append("https://index.docker.io/v1/")
    try:
        logins = json.loads(text)["auths"]
        found = next((logins[name] for name in names if name in logins), None)
        if found is None:
            return None
        plain = f"{found.get('username', '')}:{found.get('password', '')}".encode()
        return str(found.get("auth") or base64.b64encode(plain).decode())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{AUTH_VARIABLE} (model.credentialsSecretRef) is not what Docker's config.json is."
        raise FatalError("InvalidFlags", text) from error


def _fetch(repository: _Repository, reference: str, base: Path, progress: Progress) -> Path:
    """The folder of what the reference names now, complete. Raises also what `_layers` does."""
    with repository.open(f"manifests/{reference}", {"Accept": ", ".join(_MANIFESTS)}) as answer:
        manifest = answer.read(MAX_ANSWER_BYTES)
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    if reference.startswith("sha256:"):
        _check(reference, digest)
    folder = base / digest.replace(":", "-")
    if folder.is_dir():
        return folder
    layers = list(_layers(manifest))
    # Beside it until it is whole: then a rename makes it be there.
    part = folder.with_suffix(".part")
    part.mkdir(exist_ok=True)
    progress.expect(sum(size for _, size, _ in layers))
    for blob, size, name in layers:
        target = part / (name or blob.replace(":", "-"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            _pull(repository, blob, size, target, progress)
        if name is None:
            with tarfile.open(target) as archive:
                archive.extractall(part, filter="data")
            target.unlink()
    part.replace(folder)
    return folder


def _layers(manifest: bytes) -> Iterator[tuple[str, int, str | None]]:
    """(digest, bytes, file) of each layer; no file: it is an archive.

    Raises: ValueError, TypeError, KeyError or AttributeError: it is no such manifest.
    """
    for layer in json.loads(manifest)["layers"]:
        notes = layer.get("annotations") or {}
        title = next((notes[key] for key in _TITLES if key in notes), "")
        is_archive = ".tar" in layer["mediaType"] or notes.get(_UNPACK) == "true"
        # Names come from the registry, and must not lead out of the folder.
        if not is_archive and not all(map(_PART.fullmatch, title.split("/"))):
            raise ValueError(f"{title!r} is no name of a file of a model")
        if not _DIGEST.fullmatch(layer["digest"]):
            raise ValueError(f"{layer['digest']!r} is no digest by SHA-256")
        yield layer["digest"], int(layer["size"]), None if is_archive else title


def _pull(repository: _Repository, blob: str, size: int, target: Path, progress: Progress) -> None:
    """Have a blob; what was cut off goes on where it was."""
    part = target.with_name(f"{target.name}.part")
    for attempt in range(ATTEMPTS):
        try:
            digest = _pull_once(repository, blob, size, part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise
        except BROKEN:
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(pause_seconds(attempt))
    try:
        _check(blob, digest)
    except FatalError:
        part.unlink()
        raise
    part.replace(target)


def _pull_once(
    repository: _Repository, blob: str, size: int, part: Path, progress: Progress
) -> str:
    """The digest of what is there then."""
    with part.open("a+b") as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        headers = {"Range": f"bytes={start}-"} if (start := file.tell()) else {}
        if start < size:
            with repository.open(f"blobs/{blob}", headers) as answer:
                if answer.status != 206:
                    file.truncate(0)
                    digest, start = hashlib.sha256(), 0
                while piece := answer.read(PIECE_BYTES):
                    file.write(piece)
                    digest.update(piece)
                    progress.add(len(piece))
        if file.tell() < size:
            raise http.client.IncompleteRead(b"", size - file.tell())
    return f"sha256:{digest.hexdigest()}"


def _check(wanted: str, digest: str) -> None:
    if digest != wanted:
        text = f"What the registry has as {wanted} has the digest {digest}. Push it anew."
        raise FatalError("CorruptWeights", text)
