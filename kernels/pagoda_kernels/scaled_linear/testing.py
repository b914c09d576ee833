"""Matrices with random numbers, for tests of products, and what rows are rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.kv_cache import LARGEST, quantize
from pagoda_kernels.scaled_linear import Rounding, Scaled, ScaledLinear, ScaledShape

_ROWS_AT_ONCE = 37


def random_matrix(shape: ScaledShape) -> Scaled:
    """With a scale for each output and group."""
    numbers, _ = quantize(torch.randn(shape.outputs, shape.inputs), shape.dtype)
    num_groups = -(-shape.inputs // shape.group_size)
    return Scaled(numbers, torch.rand(shape.outputs, num_groups) * 0.02 + 0.001)


def fill_linear(
    linear: ScaledLinear,
    matrix: Scaled,
    bias: Tensor | None,
    input_scale: Tensor | None,
    device: torch.device,
) -> None:
    """Piece by piece."""
    for first in range(0, len(matrix.numbers), _ROWS_AT_ONCE):
        piece = slice(first, first + _ROWS_AT_ONCE)
        linear.fill(first, Scaled(*(part[piece].to(device) for part in matrix)))
    linear.finish(*(None if part is None else part.to(device) for part in (bias, input_scale)))


def round_rows(
    x: Tensor, shape: ScaledShape, rounding: Rounding, input_scale: Tensor | None
) -> Tensor:
    """What the rows' numbers stand for, in fp32."""
    x = x.float()
    if rounding is Rounding.NONE:
        return x
    if input_scale is not None:
        largest = LARGEST[shape.dtype]
        scaled = (x * (1.0 / input_scale)).clamp(-largest, largest)
        rounded = scaled.round() if shape.dtype is torch.int8 else scaled
        return rounded.to(shape.dtype).float() * input_scale
    groups = []
    for group in torch.split(x, shape.group_size, 1):
        numbers, scales = quantize(group, shape.dtype)
        groups.append(numbers.float() * scales[:, None])
    return torch.cat(groups, 1)
