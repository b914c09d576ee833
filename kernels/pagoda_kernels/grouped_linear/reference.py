"""What the numbers of a matrix stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.grouped_linear import Grouped, GroupedShape


def dequantize(rows: Grouped, shape: GroupedShape) -> Tensor:
    """[outputs, inputs] fp32."""
    zeros = 2.0 ** (shape.bits - 1) if rows.zeros is None else rows.zeros[..., None]
    integers = torch.unflatten(rows.integers, 1, (-1, shape.group_size))
    return torch.flatten((integers - zeros) * rows.scales[..., None], 1)
