"""The loops of `pagoda_kernels.packed_linear`: see `pagoda_kernels.threads`."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
import torch

from pagoda_kernels.compiled import Array, bf16_bits, compiled, narrowed
from pagoda_kernels.panels import (
    GROUP_SIZE,
    MOST_ROWS,
    PANEL_SIZE,
    VECTOR_BYTES,
    make_dot,
    narrow_panel,
)
from pagoda_kernels.threads import Task, ThreadedKernel, claim

NO_GATE, SILU, GELU, GELU_TANH = range(4)

_dot = make_dot(torch.bfloat16)

_LOG2_E = np.float32(1.4426950408889634)
_SQRT_HALF = np.float32(0.7071067811865476)
# gelu's approximation by tanh (Hendrycks and Gimpel, 2016), as a sigmoid: tanh(y) = 2s(2y) - 1.
_GELU_LINEAR, _GELU_CUBIC = np.float32(1.5957691216057308), np.float32(0.044715)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def _multiply(task: Task) -> None:
    """Arguments: packed, num_groups, x, num_rows, in_features, bias, gate, out, out_features."""
    packed, num_groups, x, num_rows, in_features = task[1], task[2], task[3], task[4], task[5]
    bias, gate, out, out_features = task[6], task[7], task[8], task[9]
    num_columns = GROUP_SIZE if gate == NO_GATE else PANEL_SIZE
    stride = 2 * in_features
    sums = np.zeros((MOST_ROWS, GROUP_SIZE), np.float32)
    at, group_bytes = sums.ctypes.data, GROUP_SIZE * stride
    num_passes = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    group = claim(task)
    while group < num_groups:
        following = claim(task)
        panels = packed + group * group_bytes
        initial = bias + group * GROUP_SIZE * 4
        first = group * num_columns
        count = min(num_columns, out_features - first)
        # Each pass asks for its part of the group that this thread has next.
        ahead = packed + min(following, num_groups - 1) * group_bytes
        row = 0
        while row < num_rows:
            rows = _dot(
                panels,
                x + row * stride,
                stride,
                num_rows - row,
                initial,
                at,
                ahead,
                2 * VECTOR_BYTES // num_passes,
            )
            ahead += group_bytes // num_passes
            if gate != NO_GATE:
                _apply_gate(sums, gate)
            for i in range(rows):
                _narrow(sums[i], out + 2 * ((row + i) * out_features + first), count)
            row += rows
        group = following


multiply = ThreadedKernel(_multiply)


@compiled
def _narrow(sums: Array, out: int, count: int) -> None:
    at = sums.ctypes.data
    if count % PANEL_SIZE == 0:
        for i in range(0, count, PANEL_SIZE):
            narrow_panel(at + 4 * i, out + 2 * i)
    else:
        columns = bf16_bits(out, (count,))
        for i in range(count):
            columns[i] = narrowed(sums[i])


@compiled
def _apply_gate(sums: Array, gate: int) -> None:
    """activation(first panel) * second, in the place of the first."""
    linear, cubic = (_ONE, _ZERO) if gate == SILU else (_GELU_LINEAR, _GELU_CUBIC)
    for row in range(MOST_ROWS):
        if gate == GELU:
            for i in range(PANEL_SIZE):
                number = sums[row, i]
                share = _HALF * (_ONE + np.float32(erf(number * _SQRT_HALF)))
                sums[row, i] = number * share * sums[row, PANEL_SIZE + i]
        else:
            for i in range(PANEL_SIZE):
                number = sums[row, i]
                share = _sigmoid(linear * (number + cubic * number * number * number))
                sums[row, i] = number * share * sums[row, PANEL_SIZE + i]


@compiled
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) within 3 units of the last place, in operations that vectors have."""
    power = min(max(-x * _LOG2_E, np.float32(-126)), np.float32(126))
    whole = np.rint(power)
    part = power - whole
    # 2 ** part, part in [-1/2, 1/2]: Taylor's series of exp(part * ln 2).
    series = np.float32(1.5403530e-4)
    series = series * part + np.float32(1.3333558e-3)
    series = series * part + np.float32(9.6181291e-3)
    series = series * part + np.float32(5.5504109e-2)
    series = series * part + np.float32(2.4022651e-1)
    series = series * part + np.float32(6.9314718e-1)
    series = series * part + _ONE
    scale = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return _ONE / (_ONE + series * scale)
