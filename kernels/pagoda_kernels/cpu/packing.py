"""Matrices brought into panels, on all threads: see `panels`."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import address_of, int32s
from pagoda_kernels.cpu.panels import (
    BYTES_PER_STEP,
    GROUP_SIZE,
    INT8_AS_BF16,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    Numbers,
    transpose_panel,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim


def pack(matrix: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """[num_groups, num_steps, GROUP_SIZE, numbers a step]: a matrix in groups of panels.

    Args:
        matrix: [out_features, in_features] bf16, or int8 between -127 and 127, on a CPU; zeros fill
            the last group.
    Raises: ValueError if in_features is not a whole number of steps.
    """
    out_features, in_features = matrix.shape
    per_step = BYTES_PER_STEP // numbers.multiplied_bytes
    if in_features % per_step:
        raise ValueError(f"in_features is {in_features}; it must be a multiple of {per_step}.")
    num_groups, num_steps = -(-out_features // GROUP_SIZE), in_features // per_step
    if numbers is INT8_AS_BF16:
        return _pack_coded(matrix, num_groups, num_steps)
    matrix = matrix.contiguous()
    panels = torch.empty(num_groups, num_steps, GROUP_SIZE, per_step, dtype=matrix.dtype)
    _pack(matrix.data_ptr(), out_features, num_steps, panels.data_ptr())
    return panels


def _pack_coded(matrix: torch.Tensor, num_groups: int, num_steps: int) -> torch.Tensor:
    missing = num_groups * GROUP_SIZE - len(matrix)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix
    groups = padded.view(num_groups, GROUP_SIZE, num_steps, -1).transpose(1, 2)
    # Sign and magnitude, and halves of eights in turns: so `_widen_vector` needs no other order.
    coded = groups.abs().to(torch.uint8) | (groups < 0).to(torch.uint8) << 7
    halves = coded.reshape(*groups.shape[:2], 2, PANEL_SIZE // 4, 8)
    return halves.transpose(2, 3).reshape(groups.shape)


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
