from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pagoda_kernels.cpu.ahead import compile_ahead
from pagoda_kernels.cpu.cache import kernels_folder, read_kernel
from pagoda_kernels.cpu.targets import TARGETS, targets_of

SMALLEST = TARGETS[-1]


@pytest.mark.slow
@pytest.mark.skipif(not targets_of(platform.machine()), reason="no targets for this machine")
def test_kernels_compiled_ahead_are_found_by_any_user_and_not_compiled_again(tmp_path):
    assert compile_ahead([SMALLEST], tmp_path) == []
    files = sorted(kernels_folder(tmp_path).iterdir())
    assert len(files) >= 9
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert kernels_folder(tmp_path).stat().st_mode & 0o777 == 0o755
    assert all(read_kernel(file.parent, file.name) for file in files)
    aim = {"NUMBA_CPU_NAME": SMALLEST.cpu, "NUMBA_CPU_FEATURES": SMALLEST.feature_flags}
    before = [file.stat().st_mtime_ns for file in files]
    subprocess.run(
        [sys.executable, "-c", "from pagoda_kernels.cpu.ahead import compile_all; compile_all()"],
        env={**os.environ, **aim, "PAGODA_CACHE": str(tmp_path)},
        check=True,
    )
    # A kernel that is compiled again is also written again.
    assert [file.stat().st_mtime_ns for file in files] == before
    assert sorted(kernels_folder(tmp_path).iterdir()) == files
