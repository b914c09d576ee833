"""The environment variables of the engine process."""

from __future__ import annotations

from collections.abc import Mapping

# Turns of a loop, about 0.1 ms, that a thread waits for the others before it sleeps.
_SPIN_COUNT = 10_000


def engine_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """That of this process, and what makes the engine's threads and memory faster.

    Weights are read from end to end at each step; in pages of 4 KiB the processor spends a part of
    that on looking up addresses, so large allocations ask for huge pages.

    By default OpenMP's threads wait for each other in a loop of some milliseconds. When another
    process has taken the core of one of them, the loop may keep that one from moving to the other
    core, at every operation. A step of 16 requests on two cores, one of them with a busy
    neighbour, was seen to take up to 1,690 ms, and takes 120 to 330 ms with a shorter loop.
    Without a neighbour both take the same time.

    NCCL's group must not abort a process where another rank died: rank 0 says which one.

    These are read when a process starts. Where the user has set them, they stay as they are.
    """
    defaults = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    }
    if "OMP_WAIT_POLICY" not in environ:
        defaults["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    return {**defaults, **environ}
