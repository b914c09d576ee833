"""The last words for what ended a process of the engine."""

from __future__ import annotations

import errno
import resource

from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.messages import EngineFailed

# How torch, the loader of libraries and the C library say that memory cannot be had.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "annot allocate memory", "failed to map segment")


def describe_failure(error: BaseException, who: str = "The engine") -> EngineFailed:
    """The last words for what ended the engine."""
    if isinstance(error, FatalError):
        return EngineFailed(reason=error.reason, message=error.message)
    # By name, because a process that never imported torch should not do it to fail.
    if type(error).__name__ == "OutOfMemoryError":
        return EngineFailed(
            reason="GpuOutOfMemory",
            message=f"The GPU's memory is full: {error} Lower --gpu-memory-utilization "
            "(engine.gpuMemoryPercent), --max-model-len or --max-num-batched-tokens.",
        )
    if _is_out_of_memory(error):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        kind, remedy = "memory is full", "give the engine more memory"
        if limit != resource.RLIM_INFINITY:
            kind, remedy = f"address space, limited to {limit} bytes, is full", "raise `ulimit -v`"
        return EngineFailed(
            reason="OutOfMemory",
            message=f"The {kind}: {str(error) or type(error).__name__}. Lower "
            f"--kv-cache-memory-bytes or --max-num-batched-tokens, or {remedy}.",
        )
    return EngineFailed(
        reason="RankDied",
        message=f"{who} failed with {type(error).__name__}: {error}. The traceback is in its log.",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Libraries that cannot be mapped are an ImportError, and files a RuntimeError."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
