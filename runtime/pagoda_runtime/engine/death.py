"""What an exit status tells about an engine process that ended without a word.

No message names a pid: the same death has the same words each time, so that a status that shows
them does not change at every restart.
"""

from __future__ import annotations

import signal
from pathlib import Path

from pagoda_runtime.engine.messages import EngineFailed

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def count_oom_kills(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """How often the kernel killed a process of this cgroup for its memory; 0 where unknown."""
    for path in _counters(cgroups, own):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def _counters(cgroups: Path, own: Path) -> list[Path]:
    """The files that may count, of cgroup v2 and v1; the mount may begin at the own cgroup."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    paths = {controllers: path.strip("/") for _, controllers, path in lines}
    v2, v1 = paths.get("", ""), paths.get("memory", "")
    return [
        cgroups / v2 / "memory.events",
        cgroups / "memory.events",
        cgroups / "memory" / v1 / "memory.oom_control",
        cgroups / "memory" / "memory.oom_control",
    ]


def describe_exit(status: int, is_out_of_memory: bool) -> EngineFailed:
    """The failure of a process with this exit status; negative: the signal that killed it."""
    if status >= 0:
        return EngineFailed(
            reason="RankDied",
            message=f"The engine process ended with status {status} without a message; see its "
            "log.",
        )
    name = signal.Signals(-status).name if -status in signal.valid_signals() else "unknown"
    killed = f"The engine process was killed by signal {-status} ({name})"
    if -status == signal.SIGKILL and is_out_of_memory:
        return EngineFailed(
            reason="OutOfMemory",
            message=f"{killed}: the memory limit was reached. Give it more memory, or lower "
            "--kv-cache-memory-bytes or --max-num-seqs.",
        )
    hint = ""
    if -status == signal.SIGKILL:
        hint = " If nobody sent it, the memory ran out: that of the machine, or of its limit."
    return EngineFailed(reason="RankDied", message=f"{killed}.{hint}")
