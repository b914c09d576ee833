"""Matrices with random numbers, for tests of products."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.grouped_linear import Grouped, GroupedLinear, GroupedShape

_ROWS_AT_ONCE = 37
"""In pieces that no tile begins with."""


def random_matrix(shape: GroupedShape, *, has_zeros: bool) -> Grouped:
    """Zeros from 0 to one above the largest number, as GPTQ's first version may have them."""
    groups = (shape.outputs, shape.inputs // shape.group_size)
    integers = torch.randint(2**shape.bits, (shape.outputs, shape.inputs), dtype=torch.uint8)
    # In fp16, as in checkpoints.
    scales = (torch.rand(groups) * 0.02 + 0.001).half().float()
    zeros = torch.randint(2**shape.bits + 1, groups).float() if has_zeros else None
    return Grouped(integers, scales, zeros)


def fill_linear(
    linear: GroupedLinear, matrix: Grouped, bias: Tensor | None, device: torch.device
) -> None:
    """Piece by piece."""
    outputs = len(matrix.integers)
    for first in range(0, outputs, _ROWS_AT_ONCE):
        piece = slice(first, first + _ROWS_AT_ONCE)
        zeros = None if matrix.zeros is None else matrix.zeros[piece].to(device)
        rows = matrix.integers[piece].to(device), matrix.scales[piece].to(device)
        linear.fill(first, Grouped(*rows, zeros))
    linear.finish(None if bias is None else bias.to(device))
