"""The product on a GPU with rows in the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.grouped_linear import Grouped, GroupedShape
from pagoda_kernels.grouped_linear.packing import choose_packing
from pagoda_kernels.grouped_linear.triton_linear import TritonGroupedLinear
from pagoda_kernels.scaled_linear import Scaled, ScaledLinear, ScaledShape


class WidenedLinear(ScaledLinear):
    """The product with a matrix of whole numbers of 8 bits, of which e4m3 has other meanings."""

    def __init__(
        self,
        shape: ScaledShape,
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
    ) -> None:
        grouped = GroupedShape(shape.outputs, shape.inputs, 8, shape.group_size)
        packing = choose_packing(grouped, is_e4m3=shape.dtype is torch.float8_e4m3fn)
        assert packing is not None
        self._is_int8 = shape.dtype is torch.int8
        self._product = TritonGroupedLinear(
            grouped, packing, dtype, device, activation, is_symmetric=True
        )

    def fill(self, first_output: int, rows: Scaled) -> None:
        integers = rows.numbers.view(torch.uint8)
        if self._is_int8:
            # Counted from -128.
            integers = integers ^ 0x80
        self._product.fill(first_output, Grouped(integers, rows.scales, None))

    def finish(self, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        self._product.finish(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    @property
    def num_bytes(self) -> int:
        return self._product.num_bytes
