"""rms_norm and add_rms_norm for bf16 on a CPU, one call each: see `pagoda_kernels.cpu.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda_kernels.cpu.compiled import Array, Kernel, compiled, sum_of_squares
from pagoda_kernels.cpu.formats import bf16_bits, floats, narrowed, widen


@Kernel
def rms_norm_cpu(
    x_at: int, weight_at: int, floor_at: int, out_at: int, num_rows: int, size: int
) -> None:
    x, weight = floats(x_at, (num_rows, size)), floats(weight_at, (size,))
    floor, out = floats(floor_at, (1,))[0], bf16_bits(out_at, (num_rows, size))
    for row in range(num_rows):
        _norm_row(x[row], weight, floor, out[row])


@compiled
def _norm_row(x: Array, weight: Array, floor: Any, out: Array) -> None:
    factor = np.float32(1) / np.sqrt(sum_of_squares(x) + floor * floor)
    for i in range(x.size):
        out[i] = narrowed(x[i] * factor * weight[i])


@Kernel
def add_rms_norm_cpu(
    total_at: int, x_at: int, weight_at: int, floor_at: int, num_rows: int, size: int
) -> None:
    total, weight = floats(total_at, (num_rows, size)), floats(weight_at, (size,))
    floor, x = floats(floor_at, (1,))[0], bf16_bits(x_at, (num_rows, size))
    wide = np.empty(size, np.float32)
    for row in range(num_rows):
        _add_norm_row(total[row], x[row], weight, floor, wide)


@compiled
def _add_norm_row(total: Array, x: Array, weight: Array, floor: Any, wide: Array) -> None:
    widen(x, wide)
    factor = np.float32(1) / np.sqrt(sum_of_squares(wide) + floor * floor)
    for i in range(wide.size):
        total[i] += wide[i] * factor * weight[i]
