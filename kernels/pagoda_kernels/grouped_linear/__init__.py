"""Products with a matrix of whole numbers that share scales in groups."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pagoda_kernels.launch import uses_triton
from pagoda_kernels.quantized_linear import QuantizedLinear, ReferenceLinear


class Grouped(NamedTuple):
    """Some rows of a matrix in whole numbers: weight = (integers - zeros) * scales."""

    integers: Tensor
    """[outputs, inputs] uint8, 0 ... 2**bits - 1."""
    scales: Tensor
    """[outputs, inputs / group_size] fp32."""
    zeros: Tensor | None
    """The same shape, fp32; None: 2 ** (bits - 1)."""


class GroupedShape(NamedTuple):
    """The matrix of a product; group_size divides inputs."""

    outputs: int
    inputs: int
    bits: int
    group_size: int


def make_grouped_linear(
    shape: GroupedShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None = None,
    is_symmetric: bool = False,
) -> QuantizedLinear[Grouped]:
    """The fastest product that the device has. is_symmetric: no rows have zeros."""
    if uses_triton(device):
        from pagoda_kernels.grouped_linear.packing import choose_packing

        if packing := choose_packing(shape):
            from pagoda_kernels.grouped_linear.triton_linear import TritonGroupedLinear

            return TritonGroupedLinear(
                shape, packing, dtype, device, activation, is_symmetric=is_symmetric
            )
    elif device.type == "cpu":
        from pagoda_kernels.cpu.grouped_linear import PanelGroupedLinear, has_grouped_panels

        if has_grouped_panels(shape, dtype):
            return PanelGroupedLinear(shape, activation, is_symmetric=is_symmetric)
    from pagoda_kernels.grouped_linear.reference import dequantize

    size = shape.outputs, shape.inputs
    return ReferenceLinear(size, partial(dequantize, shape=shape), dtype, device, activation)


def holds_own_bits(bits: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's product holds numbers in as many bits as they have; else in dtype."""
    if uses_triton(device):
        return True
    from pagoda_kernels.cpu.grouped_linear import has_grouped_panels

    return device.type == "cpu" and has_grouped_panels(GroupedShape(1, 1, bits, 1), dtype)
