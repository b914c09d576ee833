"""Matrices with random numbers, for tests of products."""

from __future__ import annotations

import torch

from pagoda_kernels.grouped_linear import Grouped, GroupedShape


def random_matrix(shape: GroupedShape, *, has_zeros: bool) -> Grouped:
    """Zeros from 0 to one above the largest number, as GPTQ's first version may have them."""
    groups = (shape.outputs, shape.inputs // shape.group_size)
    integers = torch.randint(2**shape.bits, (shape.outputs, shape.inputs), dtype=torch.uint8)
    # In fp16, as in checkpoints.
    scales = (torch.rand(groups) * 0.02 + 0.001).half().float()
    zeros = torch.randint(2**shape.bits + 1, groups).float() if has_zeros else None
    return Grouped(integers, scales, zeros)
