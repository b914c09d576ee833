"""Triton kernels, run by Python on a CPU: `make interpreted`.

In a process of their own, because Triton reads TRITON_INTERPRET when a kernel is decorated, and
because every operation on a CPU is a Triton kernel then. Numbers are fp32 or fp16: the interpreter
is silently wrong about bf16.
"""

from __future__ import annotations

from pathlib import Path

from pagoda_kernels.launch import IS_INTERPRETED

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return None if IS_INTERPRETED else collection_path.is_relative_to(HERE)
