"""What an exit status tells about a process of the engine that ended without a word.

No message names a pid: the same death has the same words each time, so that a status that shows
them does not change at every restart.
"""

from __future__ import annotations

import signal
from pathlib import Path

from pagoda_runtime.cgroup import cgroup_folders, read_counters
from pagoda_runtime.ipc.messages import EngineFailed


def count_oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel killed a process of this cgroup for its memory; 0 where unknown."""
    for folder in cgroup_folders(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            if counters := read_counters(folder / name):
                return counters.get("oom_kill", 0)
    return 0


def describe_exit(
    status: int, is_out_of_memory: bool, who: str = "The engine process", when: str = ""
) -> EngineFailed:
    """The failure of a process with this exit status; negative: the signal that killed it.

    Args:
        when: what it did meanwhile, after a space.
    """
    if status >= 0:
        return EngineFailed(
            reason="RankDied",
            message=f"{who} ended with status {status}{when} without a message; see its log.",
        )
    name = signal.Signals(-status).name if -status in signal.valid_signals() else "unknown"
    killed = f"{who} was killed by signal {-status} ({name}){when}"
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
