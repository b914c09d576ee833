"""What the machine offers: cores and memory as the cgroup allows, instruction set, bandwidth.

Only what asks torch imports it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pagoda_runtime.cgroup import cgroup_folders, read_counters

_UNLIMITED = 1 << 60


def allowed_cores(root: Path = Path("/")) -> int:
    """Cores this process may use at once: its CPU set and the cgroup's quota, at least 1."""
    cores = len(os.sched_getaffinity(0))
    for folder in cgroup_folders(root, "cpu"):
        quota = _read_cpu_quota(folder)
        if quota is not None:
            cores = min(cores, max(1, int(quota)))
    return cores


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated: the machine's, and what each cgroup above us leaves."""
    free = _UNLIMITED
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for folder in cgroup_folders(root, "memory"):
        limit = _read_int(folder, "memory.max", "memory.limit_in_bytes")
        usage = _read_int(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        # Pages of files are reclaimed when memory is needed; the model's own mapped file is such.
        counters = read_counters(folder / "memory.stat")
        # v1 counts the cgroup alone in inactive_file and its children too in total_inactive_file.
        names = ("inactive_file", "total_inactive_file")
        reclaimable = max(counters.get(name, 0) for name in names)
        free = min(free, max(0, limit - usage + reclaimable))
    return free


def instruction_set() -> str:
    """The best matrix instructions of this CPU that torch knows of."""
    import torch

    names = []
    if torch.cpu._is_amx_tile_supported():
        names.append("AMX")
    if torch.cpu._is_avx512_bf16_supported():
        names.append("AVX512-bf16")
    if torch.cpu._is_vnni_supported():
        names.append("VNNI")
    return " ".join([*names, torch.backends.cpu.get_cpu_capability()])


def predicted_tokens_per_second(weight_bytes: int, bandwidth_gbps: float) -> float:
    """Decode speed of one request if a step took as long as reading the weights once."""
    return bandwidth_gbps * 1e9 / weight_bytes


def memory_bandwidth_gbps(num_bytes: int = 1 << 28) -> float:
    """GB/s of reading memory, the best of three sums over num_bytes (beyond the caches)."""
    import torch

    data = torch.ones(num_bytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best / 1e9


def _read_cpu_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us = _read_int(folder, "cpu.cfs_quota_us")
    period_us = _read_int(folder, "cpu.cfs_period_us")
    if quota_us is None or not period_us or quota_us <= 0:
        return None
    return quota_us / period_us


def _read_int(folder: Path, *names: str) -> int | None:
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return None
