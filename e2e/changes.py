"""When objects changed, as a watch of the API server tells: for tests that measure seconds."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kube import Kubectl

Check = Callable[[dict[str, Any]], bool]


class Changes:
    """All states of the objects of one kind, each with the time at which it was told."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, dict[str, Any]]] = []
        self._changed = threading.Condition()

    def add(self, manifest: dict[str, Any]) -> None:
        with self._changed:
            self._seen.append((time.monotonic(), manifest))
            self._changed.notify_all()

    def wait(self, what: str, check: Check, *, since: float, timeout_seconds: float) -> float:
        """When an object was first told that passes the check, at `since` or later."""
        deadline = time.monotonic() + timeout_seconds
        num_checked = 0
        with self._changed:
            while True:
                for at, manifest in self._seen[num_checked:]:
                    if at >= since and check(manifest):
                        return at
                num_checked = len(self._seen)
                left = deadline - time.monotonic()
                assert left > 0, f"{what}: not within {timeout_seconds:g} s"
                self._changed.wait(left)


@contextlib.contextmanager
def watching(kubectl: Kubectl, kind: str) -> Iterator[Changes]:
    """The changes of a kind in kubectl's namespace, from now on."""
    changes = Changes()
    command = kubectl.command("get", kind, "--watch", "-o", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if line == "}\n":
                    changes.add(json.loads(text))
                    text = ""

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield changes
        finally:
            process.terminate()
            thread.join(10)
