from __future__ import annotations

import os

import pytest

from pagoda_runtime.platforms.machine import (
    allowed_cores,
    free_memory_bytes,
    instruction_set,
    predicted_tokens_per_second,
)

GIB = 2**30


def make_root(folder, files):
    for path, text in {"proc/meminfo": "MemAvailable: 8388608 kB\n", **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_without_a_cgroup_all_available_memory_is_free(tmp_path):
    assert free_memory_bytes(make_root(tmp_path, {})) == 8 * GIB


def test_the_tightest_cgroup_of_version_2_decides(tmp_path):
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/memory.max": str(4 * GIB),
            "sys/fs/cgroup/pods/memory.current": str(GIB),
            "sys/fs/cgroup/pods/one/memory.max": "max\n",
            "sys/fs/cgroup/pods/one/memory.current": "0\n",
        },
    )
    assert free_memory_bytes(root) == 3 * GIB


def test_inside_a_container_the_mount_itself_is_the_cgroup(tmp_path):
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/not/visible/here\n",
            "sys/fs/cgroup/memory.max": str(2 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    assert free_memory_bytes(root) == 3 * GIB // 2
    assert allowed_cores(root) == 1


def test_version_1_is_read_too(tmp_path):
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/pod\n1:cpu,cpuacct:/pod\n",
            "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000",
        },
    )
    assert free_memory_bytes(root) == 0
    assert allowed_cores(root) == 1


@pytest.mark.parametrize("quota", ["max 100000", "nonsense", "900000 100000"])
def test_a_wide_or_absent_quota_leaves_all_cores(tmp_path, quota):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}
    assert allowed_cores(make_root(tmp_path, files)) == len(os.sched_getaffinity(0))


def test_the_predicted_speed_is_bandwidth_by_weights():
    assert predicted_tokens_per_second(500_000_000, 30.0) == pytest.approx(60.0)


def test_this_machine_answers():
    assert free_memory_bytes() > 0
    assert allowed_cores() >= 1
    assert instruction_set()
