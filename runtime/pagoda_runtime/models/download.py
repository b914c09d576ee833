"""What downloads from web servers, buckets and registries share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path

from pagoda_runtime.errors import FatalError

OnProgress = Callable[[str, float, float], None]
"""Called with a phase, percent done and bytes per second."""

TOKEN_VARIABLE = "PAGODA_MODEL_TOKEN"
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY",
    "oci": "DOCKER_AUTH_CONFIG",
}
"""By the scheme of an address, the variables that say who asks."""
TIMEOUT_SECONDS = 60.0
# Of one file, each of which goes on where the one before was cut off.
ATTEMPTS = 5
PIECE_BYTES = 1 << 20
BROKEN = (http.client.IncompleteRead, ConnectionError, TimeoutError)
"""What ends an attempt that another one may go on from."""


def cache_folder() -> Path:
    """PAGODA_CACHE, or ~/.cache/pagoda."""
    return Path(os.environ.get("PAGODA_CACHE") or "~/.cache/pagoda").expanduser()


def pause_seconds(attempt: int) -> float:
    """Before the attempt after this one, of which the first is 0."""
    return min(8.0, 0.1 * 4**attempt)


def open_url(request: urllib.request.Request) -> HTTPResponse:
    """The answer to a request; an HTTPError that is raised holds no connection."""
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    return answer


def is_away(error: Exception) -> bool:
    """Whether the server is not there, rather than refuses."""
    return not isinstance(error, urllib.error.HTTPError) or error.code >= 500


class Progress:
    """Bytes of the weights as percents, and their speed."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._total = 0
        self._done, self._started = 0, time.monotonic()

    def expect(self, total_bytes: int) -> None:
        """Of what comes now, that is 100 %; below 1 it is not known."""
        self._total, self._done, self._started = total_bytes, 0, time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        seconds = time.monotonic() - self._started
        percent = 100.0 * self._done / self._total if self._total > 0 else 0.0
        self._on_progress("download", min(99.9, percent), self._done / max(seconds, 1e-3))


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Processes that ask at the same time wait for each other."""
    with path.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def describe_failure(uri: str, base: Path, error: Exception) -> FatalError:
    """The last words for a download to `base` that failed."""
    what = str(error) or type(error).__name__
    if isinstance(error, urllib.error.HTTPError):
        what = f"HTTP {error.code}"
        if error.code in (401, 403):
            names = KEYS.get(uri.partition("://")[0], TOKEN_VARIABLE)
            text = f"The server refuses {uri} ({what}). Set {names} to what may read it "
            return FatalError("ModelAccessDenied", f"{text}(model.credentialsSecretRef).")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"The disk is full: {uri} does not fit in {base} (PAGODA_CACHE)."
        return FatalError("DiskFull", text)
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{base} cannot be written: {error}. Set PAGODA_CACHE to another folder."
        return FatalError("DiskFull", text)
    text = f"{uri} could not be downloaded: {what}. Check the network (NetworkPolicy, proxy)."
    return FatalError("SourceUnreachable", text)
