"""Matrices with random numbers, for tests of products, and what rows are rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.kv_cache import LARGEST, quantize
from pagoda_kernels.scaled_linear import Rounding, Scaled, ScaledShape


def random_matrix(shape: ScaledShape) -> Scaled:
    """With a scale for each output and group."""
    numbers, _ = quantize(torch.randn(shape.outputs, shape.inputs), shape.dtype)
    num_groups = -(-shape.inputs // shape.group_size)
    return Scaled(numbers, torch.rand(shape.outputs, num_groups) * 0.02 + 0.001)


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
