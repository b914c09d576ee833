"""A server in a process of its own, for tests and tools."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from pagoda_runtime.last_words import TERMINATION_LOG_VARIABLE


class ServerProcess:
    """A server in a process of its own; its stderr is collected in `lines`.

    Args:
        max_open_files: of the process, if not as many as this one may open.
    """

    def __init__(
        self, command: Sequence[str], termination_log: Path, max_open_files: int | None = None
    ) -> None:
        def limit_files() -> None:
            if max_open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_open_files, max_open_files))

        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit_files,
            env={**os.environ, TERMINATION_LOG_VARIABLE: str(termination_log)},
        )
        self.lines: list[str] = []
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    def _collect(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for_url(self, timeout_seconds: float = 20.0) -> str:
        """The base URL, as soon as the server listens."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.lines:
                if found := re.search(r"Listening on (https?://\S+|unix:\S+);", line):
                    return found[1]
            time.sleep(0.01)
        raise AssertionError(f"the server does not listen:\n{''.join(self.lines)}")

    def wait_until_ready(self, timeout_seconds: float = 120.0) -> str:
        """The base URL, as soon as the model is loaded."""
        url = self.wait_for_url()
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if httpx.get(f"{url}/ready").status_code == 200:
                return url
            time.sleep(0.01)
        raise AssertionError(f"the server is never ready:\n{''.join(self.lines)}")

    def children(self) -> list[int]:
        """Process ids of its children: the engine."""
        pid = self.process.pid
        return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait(self, timeout_seconds: float = 20.0) -> int:
        """The exit status, when it has ended and all of its stderr is collected."""
        status = self.process.wait(timeout_seconds)
        self._collector.join(timeout_seconds)
        return status

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The base URL of a server whose model is loaded; on a free loopback port."""
    command = ["pagoda_runtime", "serve", str(folder), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", "0", "--num-threads", "1"]
    command += ["--drain-delay-seconds", "0.2", *flags]
    with contextlib.closing(ServerProcess(command, folder.parent / "termination-log")) as server:
        yield server.wait_until_ready()
