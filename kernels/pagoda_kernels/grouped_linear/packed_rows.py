"""The product of a CPU that widens int8 to bf16, with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.cpu.packed_linear import PackedLinear
from pagoda_kernels.cpu.panels import INT8_AS_BF16, has_panels
from pagoda_kernels.grouped_linear import Grouped, GroupedLinear, GroupedShape


def has_packed_rows(shape: GroupedShape, dtype: torch.dtype, *, is_symmetric: bool) -> bool:
    """Whether this processor has the product for such a matrix."""
    is_of_rows = shape.bits == 8 and shape.group_size == shape.inputs and is_symmetric
    return is_of_rows and dtype is torch.bfloat16 and has_panels(INT8_AS_BF16)


class PackedRowsLinear(GroupedLinear):
    """A matrix in int8, packed once it is whole."""

    def __init__(self, shape: GroupedShape, activation: str | None = None) -> None:
        self._activation = activation
        self._integers = torch.empty(shape.outputs, shape.inputs, dtype=torch.int8)
        self._scales = torch.empty(shape.outputs)

    def fill(self, first_output: int, rows: Grouped) -> None:
        own = slice(first_output, first_output + len(rows.integers))
        self._integers[own] = (rows.integers ^ 128).view(torch.int8)
        self._scales[own] = rows.scales[:, 0]

    def finish(self, bias: Tensor | None) -> None:
        self._num_bytes = self._integers.nbytes + self._scales.nbytes
        self._product = PackedLinear(self._integers, bias, self._activation, scales=self._scales)
        del self._integers, self._scales

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes
