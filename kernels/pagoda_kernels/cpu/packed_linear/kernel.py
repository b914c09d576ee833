"""The loops of `pagoda_kernels.cpu.packed_linear`: see `pagoda_kernels.cpu.threads`."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np

from pagoda_kernels.cpu.compiled import LOG2_E, Array, address_of, compiled, exp2
from pagoda_kernels.cpu.formats import bf16_bits, narrowed
from pagoda_kernels.cpu.panels import (
    BF16,
    BYTES_PER_STEP,
    GROUP_SIZE,
    MOST_ROWS,
    PANEL_SIZE,
    STEP_BYTES,
    make_dot,
    narrow_panel,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim

NO_GATE, SILU, GELU, GELU_TANH = range(4)

_dot = make_dot(BF16)

_SQRT_HALF = np.float32(0.7071067811865476)
# gelu's approximation by tanh (Hendrycks and Gimpel, 2016), as a sigmoid: tanh(y) = 2s(2y) - 1.
_GELU_LINEAR, _GELU_CUBIC = np.float32(1.5957691216057308), np.float32(0.044715)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def _multiply(task: Task) -> None:
    """Arguments: panels, num_groups, x, num_rows, in_features, bias, gate, out, out_features."""
    packed, num_groups, x, num_rows, in_features = task[1], task[2], task[3], task[4], task[5]
    bias, gate, out, out_features = task[6], task[7], task[8], task[9]
    num_columns = GROUP_SIZE if gate == NO_GATE else PANEL_SIZE
    num_passes = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    row_bytes = 2 * in_features
    group_bytes = GROUP_SIZE * row_bytes
    sums = np.zeros((MOST_ROWS, GROUP_SIZE), np.float32)
    group = claim(task)
    while group < num_groups:
        following = claim(task)
        first = group * num_columns
        count = min(num_columns, out_features - first)
        # Each pass asks for its part of the group that this thread has next.
        ahead = packed + min(following, num_groups - 1) * group_bytes
        row = 0
        while row < num_rows:
            rows = _dot(
                packed + group * group_bytes,
                row_bytes // BYTES_PER_STEP,
                x + row * row_bytes,
                row_bytes,
                num_rows - row,
                bias + group * GROUP_SIZE * 4,
                0,
                address_of(sums),
                ahead,
                STEP_BYTES // num_passes,
            )
            ahead += group_bytes // num_passes
            finish_rows(
                sums[:rows], gate, out + 2 * (row * out_features + first), out_features, count
            )
            row += rows
        group = following


multiply = ThreadedKernel(_multiply, needs=BF16.features)


@compiled
def finish_rows(sums: Array, gate: int, out: int, out_features: int, count: int) -> None:
    """Activated, if there is a gate, and rounded; count: of the columns that there are."""
    if gate != NO_GATE:
        _apply_gate(sums, gate)
    for i in range(len(sums)):
        _narrow(sums[i], out + 2 * i * out_features, count)


@compiled
def _narrow(sums: Array, out: int, count: int) -> None:
    at = address_of(sums)
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
    for row in range(len(sums)):
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
    """1 / (1 + exp(-x)) within a few units of the last place, in operations that vectors have."""
    return _ONE / (_ONE + exp2(min(-x * LOG2_E, np.float32(126))))
