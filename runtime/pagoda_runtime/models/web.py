"""Fetch a model from a web server or a bucket: the files of a folder in Hugging Face layout.

A web server lists no folder, so the files are asked for by the names that such a folder has; the
index of the weights, and modules.json, name the others. What is there is kept as long as the server
says the same ETag (or time) and size of it; what was cut off is continued.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import quote, urlsplit

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models import buckets
from pagoda_runtime.models.download import (
    ATTEMPTS,
    BROKEN,
    PIECE_BYTES,
    TOKEN_VARIABLE,
    OnProgress,
    Progress,
    cache_folder,
    describe_failure,
    is_away,
    lock,
    open_url,
    pause_seconds,
)

REQUIRED = "config.json"
OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "quantize_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
INDEX, WEIGHTS, MODULES = "model.safetensors.index.json", "model.safetensors", "modules.json"
STATE = ".pagoda.json"
# Names of files come from the server, and must not lead out of the folder.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


Authorize = Callable[[str, dict[str, str]], dict[str, str]]
"""From an address and the headers of a request for it to headers that also say who asks."""


class _Missing(Exception):
    """The server has no such file."""


@dataclass(slots=True)
class _Folder:
    """One download into one folder."""

    uri: str
    """As the user knows it."""
    url: str
    path: Path
    complete: Path
    """Is there once everything else is."""
    authorize: Authorize
    progress: Progress
    known: dict[str, list[object]] = field(default_factory=dict)
    """name → [validator, size] of what is here, or partly here."""

    def read_json(self, name: str) -> dict[str, object] | list[object] | None:
        """A file of names, fetched if it is there."""
        if not self.fetch_optional(name):
            return None
        try:
            found: dict[str, object] | list[object] = json.loads((self.path / name).read_bytes())
            return found
        except ValueError as error:
            raise FatalError("CorruptWeights", f"{self.uri}/{name} is no JSON: {error}") from error

    def fetch_optional(self, name: str) -> bool:
        try:
            self.fetch(name)
        except _Missing:
            # One that was there before must not stay beside the others.
            (self.path / name).unlink(missing_ok=True)
            return False
        return True

    def fetch(self, name: str) -> None:
        """Have the file as the server has it. Raises: _Missing, OSError, FatalError."""
        target = self.path / name
        for attempt in range(ATTEMPTS):
            try:
                self._fetch_once(name, target)
                return
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == ATTEMPTS - 1:
                    raise
            except BROKEN:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(pause_seconds(attempt))

    def _fetch_once(self, name: str, target: Path) -> None:
        part = target.with_name(f"{target.name}.part")
        with self._open(name) as answer:
            validator = answer.headers["ETag"] or answer.headers["Last-Modified"]
            num_bytes = int(answer.headers["Content-Length"] or -1)
            is_same = validator is not None and self.known.get(name) == [validator, num_bytes]
            if is_same and target.exists() and target.stat().st_size == num_bytes:
                return
            there = part.stat().st_size if is_same and part.exists() else 0
            # Before it is noted as something else, which it would be taken for after a crash.
            target.unlink(missing_ok=True)
            self.known[name] = [validator, num_bytes]
            self._begin()
            if name == WEIGHTS:
                self.progress.expect(num_bytes)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not there:
                self._write(answer, part, "wb")
        if 0 < there < num_bytes:
            with self._open(name, start=there) as answer:
                # A server that knows no ranges sends the whole.
                self._write(answer, part, "ab" if answer.status == 206 else "wb")
        if num_bytes not in (-1, part.stat().st_size):
            raise http.client.IncompleteRead(b"", num_bytes)
        part.replace(target)

    def _open(self, name: str, start: int = 0) -> HTTPResponse:
        url, headers = f"{self.url}/{quote(name)}", {}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(url)
        for header, value in self.authorize(url, headers).items():
            # Not for the server to which a redirect leads: the address there holds its own key.
            is_plain = header in headers
            (request.add_header if is_plain else request.add_unredirected_header)(header, value)
        try:
            return open_url(request)
        except urllib.error.HTTPError as error:
            # Stores that may not be listed answer 403 for what is not there.
            if error.code in (404, 410) or (error.code == 403 and name != REQUIRED):
                raise _Missing(name) from error
            raise

    def _write(self, answer: HTTPResponse, part: Path, mode: str) -> None:
        with part.open(mode) as file:
            self.progress.add(file.tell())
            while piece := answer.read(PIECE_BYTES):
                file.write(piece)
                self.progress.add(len(piece))

    def _begin(self) -> None:
        """Note what is being written: until all of it is there, the folder is of no use."""
        self.complete.unlink(missing_ok=True)
        path = self.path / STATE
        path.with_suffix(".new").write_text(json.dumps(self.known))
        path.with_suffix(".new").replace(path)


def fetch_folder(uri: str, on_progress: OnProgress) -> Path:
    """The folder of a model, with the files as the server has them now.

    It lies below PAGODA_CACHE or ~/.cache/pagoda. Where the server cannot be reached, what was
    fetched whole before is used. Processes that ask at the same time wait for each other.

    Args:
        uri: address of the folder. Who may read it is said by variables: PAGODA_MODEL_TOKEN is the
            bearer token of a web server, for buckets see `buckets.Bucket.of`.
        on_progress: as `models.source.OnProgress`.
    Raises: FatalError: ModelNotFound, ModelAccessDenied, CorruptWeights, SourceUnreachable or
        DiskFull.
    """
    uri = uri.rstrip("/")
    url, authorize = _address(uri, os.environ)
    base = cache_folder() / "web"
    name = f"{urlsplit(uri).hostname}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
    path, complete = base / name, base / f"{name}.complete"
    progress = Progress(on_progress)
    folder = _Folder(uri, url, path, complete, authorize, progress)
    on_progress("download", 0.0, 0.0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with lock(base / f"{name}.lock"):
            try:
                _fetch_all(folder)
                complete.touch()
            except (OSError, http.client.HTTPException) as error:
                if not (complete.exists() and is_away(error)):
                    raise
    except _Missing as error:
        text = f"{uri}/{error} does not exist. Give --model (model.uri) the address of a folder in "
        raise FatalError("ModelNotFound", f"{text}Hugging Face layout.") from error
    except (OSError, http.client.HTTPException) as error:
        raise describe_failure(uri, base, error) from error
    on_progress("download", 100.0, 0.0)
    return path


def _address(uri: str, environment: Mapping[str, str]) -> tuple[str, Authorize]:
    """Where the folder is, and how its files are asked for."""
    if uri.startswith(buckets.SCHEMES):
        bucket = buckets.Bucket.of(uri, environment)
        return bucket.url, lambda url, headers: bucket.sign(url, headers, datetime.now(UTC))
    token = environment.get(TOKEN_VARIABLE)
    added = {"Authorization": f"Bearer {token}"} if token else {}
    return uri, lambda _, headers: {**headers, **added}


def _fetch_all(folder: _Folder) -> None:
    uri = folder.uri
    with contextlib.suppress(OSError, ValueError):
        folder.known = json.loads((folder.path / STATE).read_bytes())
    folder.fetch(REQUIRED)
    for name in OPTIONAL:
        folder.fetch_optional(name)
    for module in _strings(folder.read_json(MODULES), "path"):
        if module:
            folder.fetch(f"{_checked(uri, module)}/{REQUIRED}")
            folder.fetch_optional(f"{module}/{WEIGHTS}")
    index = folder.read_json(INDEX)
    if not isinstance(index, dict):
        folder.fetch(WEIGHTS)
        return
    shards, facts = index.get("weight_map"), index.get("metadata")
    total = facts.get("total_size") if isinstance(facts, dict) else None
    folder.progress.expect(total if isinstance(total, int) else 0)
    for shard in sorted(set(shards.values()) if isinstance(shards, dict) else (), key=str):
        folder.fetch(_checked(uri, shard))


def _strings(found: object, key: str) -> Iterator[str]:
    for item in found if isinstance(found, list) else ():
        yield str(item.get(key, "")) if isinstance(item, dict) else ""


def _checked(uri: str, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FatalError("CorruptWeights", f"{uri}: {name!r} is no name of a file of a model.")
    return name
