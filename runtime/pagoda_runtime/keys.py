"""The API keys of a server: those it was started with, and those of a file that may change."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from pagoda_runtime.errors import FatalError

logger = logging.getLogger("pagoda.server")

VARIABLE = "PAGODA_API_KEY"
REFRESH_SECONDS = 1.0


def environment_keys(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of PAGODA_API_KEY, which stand between commas or newlines."""
    return _split(environ.get(VARIABLE, "").replace(",", "\n"))


class ApiKeys:
    """Who may call.

    Args:
        given: keys that hold as long as the server runs.
        path: a file with a key a line, or a folder of such files. When they change the keys do,
            a second later at most; when they cannot be read, the keys stay as they are.
    Raises: FatalError: InvalidFlags, there is no key at path.
    """

    def __init__(self, given: Collection[str] = (), path: str | None = None) -> None:
        self._given = _digests(given)
        self._path = None if path is None else Path(path)
        self._read_seconds = time.monotonic()
        self._trouble = ""
        self._keys: tuple[str, ...] = ()
        self._accepted = self._given
        self._is_watched = False
        if self._path is not None:
            try:
                self._take(read_keys(self._path))
            except (OSError, ValueError) as error:
                raise self._unusable(str(error)) from error
            if not self._keys:
                raise self._unusable("it holds no key")
            # What is neither, such as a pipe, can be read only once.
            self._is_watched = self._path.is_file() or self._path.is_dir()

    @property
    def are_asked(self) -> bool:
        """Whether a call needs a key; a file whose keys were all taken away lets nobody in."""
        return bool(self._given) or self._path is not None

    def accept(self, key: bytes) -> bool:
        """Whether this is one of the keys."""
        if self._is_watched and time.monotonic() - self._read_seconds >= REFRESH_SECONDS:
            self._refresh()
        digest = hashlib.sha256(key).digest()
        # Every key is compared, so that the time does not tell which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self._accepted]
        return any(matches)

    def _refresh(self) -> None:
        assert self._path is not None
        self._read_seconds = time.monotonic()
        trouble = ""
        try:
            keys = read_keys(self._path)
            if keys != self._keys:
                self._take(keys)
                logger.info("API keys changed: %s has %d now", self._path, len(keys))
            if not keys:
                trouble = "it holds no key: nobody is let in by it"
        except (OSError, ValueError) as error:
            trouble = f"{error}; its last keys hold on"
        if trouble and trouble != self._trouble:
            logger.warning("--api-key-file %s: %s", self._path, trouble)
        self._trouble = trouble

    def _take(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._accepted = [*self._given, *_digests(keys)]

    def _unusable(self, cause: str) -> FatalError:
        return FatalError(
            "InvalidFlags",
            f"--api-key-file {self._path} cannot be used: {cause}. Name a file with one key a "
            "line, or a folder of such files.",
        )


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, or of the files in a folder. Raises OSError, ValueError (no UTF-8)."""
    files = [path]
    if path.is_dir():
        # Where a Secret is mounted, hidden folders hold what the visible names point to.
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if file.is_file())
    return _split("\n".join(file.read_text(encoding="utf-8") for file in files))


def _split(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _digests(keys: Collection[str]) -> list[bytes]:
    # They have one length, so comparing them tells nothing about a key's length.
    return [hashlib.sha256(key.encode()).digest() for key in keys]
