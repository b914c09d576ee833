"""The specification of the product: the matrix in the model's dtype, and torch's linear.

Rows are not rounded: a product that rounds them comes near this one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.scaled_linear import Scaled, ScaledLinear, ScaledShape


class ReferenceScaledLinear(ScaledLinear):
    """Of rows that are rounded to the dtype as they come."""

    def __init__(
        self,
        shape: ScaledShape,
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
    ) -> None:
        self._shape, self._activation = shape, activation
        self._weight = torch.zeros(shape.outputs, shape.inputs, dtype=dtype, device=device)
        self._bias: Tensor | None = None

    def fill(self, first_output: int, rows: Scaled) -> None:
        weight = dequantize(rows, self._shape)
        self._weight[first_output : first_output + len(weight)] = weight

    def finish(self, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self._weight, self._bias)
        return y if self._activation is None else gated_activation(y, self._activation)

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes


def dequantize(rows: Scaled, shape: ScaledShape) -> Tensor:
    """[outputs, inputs] fp32."""
    scales = rows.scales.repeat_interleave(shape.group_size, 1)[:, : shape.inputs]
    return rows.numbers.float() * scales
