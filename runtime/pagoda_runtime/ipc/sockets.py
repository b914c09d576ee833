"""The folder of the sockets between the API process and its engine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from pagoda_runtime.errors import FatalError

_PREFIX = "pagoda-engine-"
# Between the making of a folder and its lock there is less.
_UNLOCKED_SECONDS = 60.0


class SocketFolder:
    """A folder that no other user can enter, locked as long as this process lives.

    Whoever can connect to its sockets can read other users' requests. Raises: FatalError DiskFull.
    """

    def __init__(self) -> None:
        remove_abandoned(Path(tempfile.gettempdir()), time.time())
        try:
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            self._lock: int | None = _lock(self.path)
        except OSError as error:
            raise FatalError(
                "DiskFull",
                f"Cannot make a folder for the engine's sockets: {error}. Set TMPDIR to a folder "
                "that can be written.",
            ) from error

    def remove(self) -> None:
        """Once or more often."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def input_address(folder: str) -> str:
    """Where the engine takes requests."""
    return f"ipc://{folder}/input"


def output_address(folder: str) -> str:
    """Where the API process takes tokens."""
    return f"ipc://{folder}/output"


def remove_abandoned(parent: Path, now: float) -> None:
    """Remove this user's folders of sockets whose processes were all killed at once.

    An engine that outlives its parent removes its folder itself. now: of time.time().
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        # It belongs to someone else, is in use, or went meanwhile.
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.geteuid() and now - status.st_mtime > _UNLOCKED_SECONDS:
                lock = _lock(str(folder))
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: str) -> int:
    """A descriptor that holds the folder's lock. Raises OSError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
