"""The environment variables of the engine process."""

from __future__ import annotations

from collections.abc import Mapping


def engine_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """That of this process, and large allocations in transparent huge pages.

    Weights are read from end to end at each step; in pages of 4 KiB the processor spends a part of
    that on looking up addresses. The C library reads this variable when a process starts. Where
    the user has set it, it stays as it is.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **environ}
