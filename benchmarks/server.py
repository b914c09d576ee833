"""A real `pagoda serve` process for the benchmarks."""

from __future__ import annotations

import contextlib
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pagoda_runtime.server.testing_process import ServerProcess

READY_SECONDS = 300.0


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[str, ServerProcess]]:
    """(base URL, process) of a server whose model is loaded."""
    command = ["pagoda_runtime", "serve", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryDirectory() as log_folder:
        server = ServerProcess([*command, *flags], Path(log_folder) / "termination-log")
        try:
            url = server.wait_for_url()
            _wait_until_ready(url, server)
            yield url, server
        finally:
            server.close()


def _wait_until_ready(url: str, server: ServerProcess) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready"):
                return
        except urllib.error.HTTPError:
            time.sleep(0.1)
    raise RuntimeError(f"the server is not ready:\n{''.join(server.lines)}")
