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


def held_in(bits: int, *, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """The bits in which the device's product for numbers of so many bits holds them, and the inputs
    of its smallest groups; smaller ones take as much memory.
    """
    if uses_triton(device):
        return bits, 1
    from pagoda_kernels.cpu.grouped_linear import SMALLEST_GROUP, has_grouped_panels, held_bits

    shape = GroupedShape(SMALLEST_GROUP, SMALLEST_GROUP, bits, SMALLEST_GROUP)
    if device.type == "cpu" and has_grouped_panels(shape, dtype):
        return held_bits(bits), SMALLEST_GROUP
    return 8 * dtype.itemsize, 1
