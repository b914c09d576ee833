"""What an exit status tells about an engine process that ended without a word."""

from __future__ import annotations

import signal
from pathlib import Path

from pagoda_runtime.engine.messages import EngineFailed

MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


def count_oom_kills() -> int:
    """How often the kernel killed a process of this cgroup for its memory; 0 where unknown."""
    try:
        lines = MEMORY_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def describe_exit(pid: int, status: int, is_out_of_memory: bool) -> EngineFailed:
    """The failure of a process with this exit status; negative: the signal that killed it."""
    if status >= 0:
        return EngineFailed(
            reason="RankDied",
            message=f"The engine process (pid {pid}) ended with status {status} without a "
            "message; see its log.",
        )
    name = signal.Signals(-status).name if -status in signal.valid_signals() else "unknown"
    killed = f"The engine process (pid {pid}) was killed by signal {-status} ({name})"
    if -status == signal.SIGKILL and is_out_of_memory:
        return EngineFailed(
            reason="OutOfMemory",
            message=f"{killed}: the memory limit was reached. Give it more memory, or lower "
            "--kv-cache-memory-bytes or --max-num-seqs.",
        )
    hint = " If nobody sent it, the machine ran out of memory." if -status == 9 else ""
    return EngineFailed(reason="RankDied", message=f"{killed}.{hint}")
