"""The output of a batch: a file that only grows, a line for each line of the input.

It is also the memory of the run: whatever has a line here is done. A process that is killed leaves
at most one line that is cut off, which the next run removes.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import msgspec

from pagoda_runtime.batch.lines import BadLine, Line
from pagoda_runtime.errors import FatalError
from pagoda_runtime.server.answers import ChatCompletion, Completion
from pagoda_runtime.server.errors import ApiError

# With it every line begins, so that a line cut off is known from a file of another kind.
_HEAD = b'{"id":"batch_req_'


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line of the input has no answer of status 200."""

    code: str
    message: str
    line: int


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What the server answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the output, in OpenAI's form."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Problem | None


def make_result(line: Line, answer: ChatCompletion | Completion | ApiError) -> Result:
    """The result of a request: from status 400 on it is an error too."""
    result_id = f"batch_req_{line.number}"
    if not isinstance(answer, ApiError):
        response = Response(
            status_code=200, request_id=answer.id, body=msgspec.Raw(msgspec.json.encode(answer))
        )
        return Result(id=result_id, custom_id=line.custom_id, response=response, error=None)
    error = answer.body.error
    problem = Problem(
        code=error.code or ("invalid_request" if answer.status < 500 else "server_error"),
        message=f"Line {line.number}: {error.message}",
        line=line.number,
    )
    response = Response(
        status_code=answer.status, request_id=result_id, body=msgspec.Raw(answer.encode())
    )
    return Result(id=result_id, custom_id=line.custom_id, response=response, error=problem)


def make_bad_result(line: BadLine) -> Result:
    """The result of a line that is no request."""
    return Result(
        id=f"batch_req_{line.number}",
        custom_id=line.custom_id,
        response=None,
        error=Problem(
            code=line.code, message=f"Line {line.number}: {line.message}", line=line.number
        ),
    )


class ResultFile:
    """The output file, held against other writers until it is closed.

    Args:
        path: made if it does not exist; what it holds of an earlier run is kept.
    Raises: FatalError: InvalidFlags if it cannot be opened, another process writes it, or it holds
        something that is no result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.custom_ids: set[str] = set()
        """Those that have a result."""
        self.line_numbers: set[int] = set()
        """Lines of the input whose result has no custom_id."""
        self._is_synced = True
        self._syncing = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FatalError(
                "InvalidFlags",
                f"-o {path} cannot be written: {error.strerror}. Name a file in a folder that "
                "exists and can be written.",
            ) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def write(self, result: Result) -> None:
        """Append a line; it survives the death of this process. Raises FatalError DiskFull."""
        data = memoryview(msgspec.json.encode(result) + b"\n")
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise FatalError(
                "DiskFull",
                f"{self.path} cannot be written: {error.strerror}. Make room, and run the same "
                "command again to continue.",
            ) from error
        self._is_synced = False

    def sync(self) -> None:
        """Wait until all lines survive the death of the machine. May be called on any thread."""
        with self._syncing:
            if not self._is_synced:
                # Before the call: what is written during it waits for the next one.
                self._is_synced = True
                os.fsync(self._file)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            with self._syncing:
                os.close(self._file)
                self._is_synced = True

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FatalError(
                "InvalidFlags", f"Another process writes -o {self.path} now; wait for its end."
            ) from error

    def _read(self) -> None:
        """Take up what an earlier run finished, and cut off what it did not finish."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n") and (raw.startswith(_HEAD) or _HEAD.startswith(raw)):
                    break
                self._take(raw, number)
                end += len(raw)
        os.ftruncate(self._file, end)

    def _take(self, raw: bytes, number: int) -> None:
        try:
            result = msgspec.json.decode(raw, type=Result)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FatalError(
                "InvalidFlags",
                f"-o {self.path} exists, and its line {number} is no result of a batch: {error}. "
                "Name another file.",
            ) from error
        if result.custom_id is not None:
            self.custom_ids.add(result.custom_id)
        elif result.error is not None:
            self.line_numbers.add(result.error.line)
