"""Starting and stopping the cluster's processes, each with a pid file of its own.

A pid file holds the pid and the process's start time in clock ticks since boot. After a crash the
pid may belong to a stranger; a stranger started at another time, so nothing but our own process is
ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .console import tail
from .settings import ClusterError, Settings

PROC = Path("/proc")
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Program:
    """One process of the cluster: its name is that of its pid file and its log."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    in_node: bool = False


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, and not one that got its number later."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """The process that has this pid now; None if there is none or it has ended."""
        state_and_ticks = _state_and_start_ticks(pid)
        if state_and_ticks is None or state_and_ticks[0] in "ZX":
            return None
        return ProcessId(pid, state_and_ticks[1])

    @property
    def is_alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(f"{self.pid} {self.start_ticks}\n")
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> ProcessId | None:
        """What a pid file says; None without one, or with one that a crash left half written."""
        try:
            pid, start_ticks = path.read_text().split()
            return ProcessId(int(pid), int(start_ticks))
        except (FileNotFoundError, ValueError):
            return None


def _state_and_start_ticks(pid: int) -> tuple[str, int] | None:
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def running(settings: Settings, name: str) -> ProcessId | None:
    """The process of that name, if it is alive."""
    process = ProcessId.read(settings.pids / name)
    return process if process and process.is_alive else None


def start(settings: Settings, program: Program, node: ProcessId | None = None) -> ProcessId:
    """Start a program in the background, with its log in settings.logs.

    Args:
        node: for programs of the node, the first process of the namespaces to start it in.
    """
    settings.logs.mkdir(parents=True, exist_ok=True)
    assert program.in_node == (node is not None), program.name
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _launch(settings, program, node, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    # The program's pid; and after a failure, the reason, perhaps before the pid.
    match = re.fullmatch(r"pid (\d+)\n", answer)
    if not match:
        reason = answer.replace("\n", " ").strip()
        raise ClusterError(f"{program.name} could not be started: {reason}")
    process = ProcessId.of(int(match[1]))
    if process is None:
        raise ClusterError(f"{program.name} ended at once. {log_end(settings, program.name)}")
    process.write(settings.pids / program.name)
    return process


def _launch(settings: Settings, program: Program, node: ProcessId | None, answer: int) -> None:
    """In a forked child: enter the node, fork the program, tell its pid, and never return.

    The pid told is the one outside of the node: it is the launcher, still outside, that forks.
    """
    try:
        log = os.open(settings.logs / f"{program.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.setsid()
        if node:
            _enter(node)
        pid = os.fork()
        if pid == 0:
            os.dup2(nothing, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir("/")
            _close_the_rest_on_exec()
            environment = {**os.environ, **program.environment}
            os.execvpe(program.command[0], list(program.command), environment)
        os.write(answer, f"pid {pid}\n".encode())
    except OSError as error:
        # The forked program gets here, too, if there is nothing to execute; if there is, executing
        # it closes its end of the pipe.
        os.write(answer, f"{program.command[0]}: {error}\n".encode())
        os._exit(127)
    os._exit(0)


def _close_the_rest_on_exec() -> None:
    """What a shell or make left open for us is not for a process that outlives them."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(entry) > 2:
                os.set_inheritable(int(entry), False)


def _enter(node: ProcessId) -> None:
    """Make the mount namespace of the node this process's, and its pid namespace its children's."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptors = [
        os.open(PROC / str(node.pid) / "ns" / kind, os.O_RDONLY) for kind in ("pid", "mnt")
    ]
    for descriptor in descriptors:
        if libc.setns(descriptor, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")
        os.close(descriptor)


def stop(settings: Settings, name: str, *, grace_seconds: float = 5.0) -> None:
    """End the process of that name and wait until it is gone; first kindly, then by SIGKILL."""
    process = ProcessId.read(settings.pids / name)
    if process:
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
            if not process.is_alive:
                break
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                break
            wait_gone(process, seconds)
        if process.is_alive:
            raise ClusterError(f"{name} (process {process.pid}) does not end, even by SIGKILL.")
    (settings.pids / name).unlink(missing_ok=True)


def wait_gone(process: ProcessId, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.is_alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def log_end(settings: Settings, name: str) -> str:
    path = settings.logs / f"{name}.log"
    return f"The end of {path}:\n{tail(path)}"
