"""Matrices brought into panels, on all threads: see `panels`."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import address_of
from pagoda_kernels.cpu.formats import int32s, uint8s
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
    is_coded = numbers is INT8_AS_BF16
    dtype = torch.uint8 if is_coded else matrix.dtype
    matrix = matrix.contiguous()
    panels = torch.empty(num_groups, num_steps, GROUP_SIZE, per_step, dtype=dtype)
    pack_groups = _pack_coded if is_coded else _pack
    pack_groups(matrix, out_features, num_steps, panels)
    return panels


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


def _pack_coded_groups(task: Task) -> None:
    """Arguments: as of `_pack_groups`; a number becomes a sign and a magnitude.

    Of a step, halves of eights lie in turns: so `_widen_vector` needs no other order.
    """
    matrix, num_rows, num_steps, panels = task[1], task[2], task[3], task[4]
    in_features, step_bytes = 2 * num_steps, 2 * GROUP_SIZE
    num_groups = (num_rows + GROUP_SIZE - 1) // GROUP_SIZE
    group = claim(task)
    while group < num_groups:
        to = uint8s(panels + group * GROUP_SIZE * in_features, (num_steps, step_bytes))
        for i in range(GROUP_SIZE):
            row = group * GROUP_SIZE + i
            half, eighth, place = 2 * i // GROUP_SIZE, 2 * i % GROUP_SIZE // 8, 2 * i % 8
            at = eighth * 16 + half * 8 + place
            if row < num_rows:
                numbers = uint8s(matrix + row * in_features, (num_steps, 2))
                for step in range(num_steps):
                    for j in range(2):
                        number = numbers[step, j]
                        is_negative = number > 127
                        to[step, at + j] = 384 - number if is_negative else number
            else:
                to[:, at : at + 2] = 0
        group = claim(task)


_pack_coded = ThreadedKernel(_pack_coded_groups)
