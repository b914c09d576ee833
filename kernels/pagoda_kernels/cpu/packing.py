"""Matrices brought into panels, on all threads: see `panels`."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import address_of
from pagoda_kernels.cpu.formats import int32s
from pagoda_kernels.cpu.panel_memory import PANEL_MEMORY
from pagoda_kernels.cpu.panels import (
    BYTES_PER_STEP,
    GROUP_SIZE,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    Numbers,
    transpose_panel,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim


def make_panels(num_groups: int, in_features: int, numbers: Numbers) -> torch.Tensor:
    """[num_groups, num_steps, GROUP_SIZE, numbers a step] bf16 or int8: zeros.

    Raises: ValueError if in_features is not a whole number of steps.
    """
    per_step = BYTES_PER_STEP // numbers.multiplied_bytes
    if in_features % per_step:
        raise ValueError(f"in_features is {in_features}; it must be a multiple of {per_step}.")
    size = num_groups, in_features // per_step, GROUP_SIZE, per_step
    dtype = torch.int8 if numbers.multiplied_bytes == 1 else torch.bfloat16
    return PANEL_MEMORY.zeros(*size, dtype=dtype)


def pack(matrix: torch.Tensor, panels: torch.Tensor) -> None:
    """Write a matrix into groups of panels.

    Args:
        matrix: [out_features, in_features] bf16 or int8, on a CPU; zeros fill the last group.
        panels: of `make_panels`, or some of its groups.
    """
    assert matrix.dtype is panels.dtype
    _pack(matrix.contiguous(), len(matrix), panels.shape[1], panels)


def columns_of(first: int, num_rows: int, outputs: int, num_parts: int) -> torch.Tensor:
    """Where rows of a matrix, from one on, are in its panels; those of gate and up take turns.

    Args: outputs: of a part; num_parts: 1, or 2 for a matrix that stacks gate and up.
    """
    rows = torch.arange(first, first + num_rows)
    if num_parts == 1:
        return rows
    part, row = rows // outputs, rows % outputs
    return row // PANEL_SIZE * GROUP_SIZE + part * PANEL_SIZE + row % PANEL_SIZE


def _pack_groups(task: Task) -> None:
    """Arguments: matrix, num_rows, num_steps, panels. A part is a group."""
    matrix, num_rows, num_steps, panels = task[1], task[2], task[3], task[4]
    row_bytes = num_steps * BYTES_PER_STEP
    num_groups = (num_rows + GROUP_SIZE - 1) // GROUP_SIZE
    num_whole = num_steps // PANEL_SIZE * PANEL_SIZE
    rows, zeros = np.empty(GROUP_SIZE, np.int64), np.zeros(num_steps, np.int32)
    group = claim(task)
    while group < num_groups:
        for i in range(GROUP_SIZE):
            row = group * GROUP_SIZE + i
            rows[i] = matrix + row * row_bytes if row < num_rows else address_of(zeros)
        to = panels + group * GROUP_SIZE * row_bytes
        for step in range(0, num_whole, PANEL_SIZE):
            at = to + step * STEP_BYTES
            transpose_panel(address_of(rows), step * BYTES_PER_STEP, at, STEP_BYTES)
            others = address_of(rows) + 8 * PANEL_SIZE
            transpose_panel(others, step * BYTES_PER_STEP, at + VECTOR_BYTES, STEP_BYTES)
        for step in range(num_whole, num_steps):
            words = int32s(to + step * STEP_BYTES, (GROUP_SIZE,))
            for i in range(GROUP_SIZE):
                words[i] = int32s(rows[i] + step * BYTES_PER_STEP, (1,))[0]
        group = claim(task)


_pack = ThreadedKernel(_pack_groups)
