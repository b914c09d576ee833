"""A process with the operator's modules imported, from which operators are forked.

Starting Python and importing takes ten times as long as starting to serve. A line of JSON on
standard input starts an operator; a line on standard output says which process it is, and another
one how it ended. Nothing runs here before a fork: an operator finds the process as a new one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, NoReturn

import kubernetes.aio.client.api_client  # noqa: F401 (a fork has it)
from kubernetes.aio.config import kube_config

import pagoda_operator.main
import pagoda_operator.tools

_SHIFTED = ("reconcile", "lease", "observe", "status", "causes")


def main() -> None:
    """Serve orders until standard input ends; then every operator is killed."""
    wake, notify = os.pipe()
    os.set_blocking(notify, False)
    signal.set_wakeup_fd(notify)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The bench ends it; a Ctrl-C is for the bench.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: set[int] = set()
    rest = b""
    _tell({"ready": os.getpid()})
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _reap(running)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                running.add(_start(json.loads(line), (wake, notify)))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _reap(running: set[int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        running.discard(pid)
        _tell({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _start(order: dict[str, Any], pipes: tuple[int, int]) -> int:
    pid = os.fork()
    if pid == 0:
        for pipe in pipes:
            os.close(pipe)
        _become_operator(order)
    _tell({"started": pid, "order": order["order"]})
    return pid


def _become_operator(order: dict[str, Any]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ["KUBECONFIG"] = order["kubeconfig"]
    # Read from the environment when it was imported.
    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = order["kubeconfig"]
    os.environ.pop("KUBERNETES_SERVICE_HOST", None)
    if "resync_seconds" in order:
        pagoda_operator.main.RESYNC_SECONDS = order["resync_seconds"]
    if "clock" in order:
        _shift_clock(Path(order["clock"]))
    status = 0
    try:
        pagoda_operator.main.main(order["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    os._exit(status)


def _shift_clock(file: Path) -> None:
    """Let the operator's clock of day be wrong by the seconds in the file, at any moment."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=float(file.read_text()))

    for name in _SHIFTED:
        module = sys.modules[f"pagoda_operator.{name}"]
        if hasattr(module, "datetime"):
            module.datetime = Shifted  # type: ignore[attr-defined]


def _tell(news: dict[str, Any]) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


if __name__ == "__main__":
    main()
