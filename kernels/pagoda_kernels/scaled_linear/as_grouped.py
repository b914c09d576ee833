"""The product by one with a matrix of whole numbers of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.grouped_linear import Grouped, GroupedShape, make_grouped_linear
from pagoda_kernels.quantized_linear import QuantizedLinear
from pagoda_kernels.scaled_linear import Scaled, ScaledShape


class AsGroupedLinear(QuantizedLinear[Scaled]):
    """Numbers of 8 bits are seen as whole ones, of which e4m3 has other meanings."""

    def __init__(self, product: QuantizedLinear[Grouped], dtype: torch.dtype) -> None:
        self._product, self._is_int8 = product, dtype is torch.int8
        self.are_rows_alike = product.are_rows_alike

    def fill(self, first_output: int, rows: Scaled) -> None:
        integers = rows.numbers.view(torch.uint8)
        if self._is_int8:
            # Counted from -128.
            integers = integers ^ 0x80
        self._product.fill(first_output, Grouped(integers, rows.scales, None))

    def finish(self, bias: Tensor | None) -> None:
        self._product.finish(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    @property
    def num_bytes(self) -> int:
        return self._product.num_bytes


def _grouped(shape: ScaledShape) -> GroupedShape:
    return GroupedShape(shape.outputs, shape.inputs, 8, shape.group_size)


def int8_as_grouped(
    shape: ScaledShape, dtype: torch.dtype, device: torch.device, activation: str | None
) -> QuantizedLinear[Scaled]:
    """Of int8 with whole groups."""
    product = make_grouped_linear(
        _grouped(shape), dtype=dtype, device=device, activation=activation, is_symmetric=True
    )
    return AsGroupedLinear(product, shape.dtype)


def widened_on_gpu(
    shape: ScaledShape, dtype: torch.dtype, device: torch.device, activation: str | None
) -> QuantizedLinear[Scaled]:
    """With rows in the model's dtype."""
    from pagoda_kernels.grouped_linear.packing import choose_packing
    from pagoda_kernels.grouped_linear.triton_linear import TritonGroupedLinear

    grouped = _grouped(shape)
    packing = choose_packing(grouped, is_e4m3=shape.dtype is torch.float8_e4m3fn)
    assert packing is not None
    product = TritonGroupedLinear(grouped, packing, dtype, device, activation, is_symmetric=True)
    return AsGroupedLinear(product, shape.dtype)
