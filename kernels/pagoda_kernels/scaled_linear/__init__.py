"""Products with a matrix of numbers of 8 bits, e4m3 or int8, and with rows that may be rounded to
the same.
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pagoda_kernels.launch import compute_capability, uses_triton
from pagoda_kernels.quantized_linear import QuantizedLinear, ReferenceLinear

GROUP_SIZE = 128
"""Of the columns that share a scale in checkpoints with blocks."""


class Rounding(Enum):
    """What is done to the rows that the matrix is multiplied with."""

    NONE = "none"
    STATIC = "static"
    """Rounded to the matrix's dtype by a scale that is given, once for all."""
    DYNAMIC = "dynamic"
    """By each row's largest number, or that of each of its groups."""


class Scaled(NamedTuple):
    """Some rows of a matrix: weight = numbers * scales."""

    numbers: Tensor
    """[outputs, inputs] e4m3 or int8."""
    scales: Tensor
    """[outputs, inputs / group_size, rounded up] fp32. Who has a scale for the whole matrix, or for
    blocks, repeats it for each output."""


class ScaledShape(NamedTuple):
    """The matrix of a product.

    dtype: float8_e4m3fn or int8.
    group_size: of the columns that share a scale: as many as there are, or 128.
    """

    outputs: int
    inputs: int
    dtype: torch.dtype
    group_size: int


def make_scaled_linear(
    shape: ScaledShape,
    rounding: Rounding,
    *,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None = None,
    input_scale: Tensor | None = None,
) -> QuantizedLinear[Scaled]:
    """The fastest product that the device has. On a GPU that does not multiply the matrix's dtype
    by itself, or where rounding is none, the matrix is widened, and rows are not rounded. On a CPU
    rows are rounded as `cpu.grouped_linear` does it if the matrix is int8, else not.

    Args:
        input_scale: [] fp32, for Rounding.STATIC.
    Raises: ValueError: groups of another size.
    """
    if shape.group_size not in (shape.inputs, GROUP_SIZE):
        raise ValueError(
            f"Groups have {shape.group_size} of {shape.inputs} columns; a scale is for all columns "
            f"or for {GROUP_SIZE}."
        )
    if uses_triton(device):
        from pagoda_kernels.scaled_linear.as_grouped import widened_on_gpu
        from pagoda_kernels.scaled_linear.triton_linear import TritonScaledLinear

        is_fast = shape.dtype is torch.int8 or compute_capability(device) >= (8, 9)
        if rounding is Rounding.NONE or not is_fast:
            return widened_on_gpu(shape, dtype, device, activation)
        return TritonScaledLinear(shape, rounding, dtype, device, activation, input_scale)
    if device.type == "cpu":
        from pagoda_kernels.cpu.scaled_linear import PanelScaledLinear, has_scaled_panels
        from pagoda_kernels.scaled_linear.as_grouped import int8_as_grouped

        if has_scaled_panels(shape, dtype):
            return PanelScaledLinear(shape, activation)
        if shape.dtype is torch.int8 and shape.inputs % shape.group_size == 0:
            return int8_as_grouped(shape, dtype, device, activation)
    from pagoda_kernels.scaled_linear.reference import dequantize

    size = shape.outputs, shape.inputs
    return ReferenceLinear(size, partial(dequantize, shape=shape), dtype, device, activation)
