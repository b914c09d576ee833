"""What all products with quantized matrices are, and the specification of what they compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from pagoda_kernels.gated_activation import gated_activation

Rows = TypeVar("Rows")
"""Some rows of a matrix, as its kind has them: `Grouped` or `Scaled`."""


class QuantizedLinear(ABC, Generic[Rows]):
    """x @ weight.T + bias; with an activation, of a matrix that stacks gate and up,
    activation(gate) * up.
    """

    are_rows_alike = False
    """Whether a row's bits never depend on the other rows."""

    @abstractmethod
    def fill(self, first_output: int, rows: Rows) -> None:
        """Take over some rows of the matrix, from an output on; rows that never come are zeros."""

    @abstractmethod
    def finish(self, bias: Tensor | None) -> None:
        """After all rows; bias: [outputs], or none."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, outputs] in the dtype of x, [num_rows, inputs]."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of the matrix, as it is held."""


class ReferenceLinear(QuantizedLinear[Rows]):
    """The specification: the matrix in the model's dtype, and torch's linear. Rows of x are not
    rounded: a product that rounds them comes near this one.

    Args:
        size: outputs and inputs.
        dequantize: some rows as [outputs, inputs] fp32.
    """

    def __init__(
        self,
        size: tuple[int, int],
        dequantize: Callable[[Rows], Tensor],
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
    ) -> None:
        self._dequantize, self._activation = dequantize, activation
        self._weight = torch.zeros(size, dtype=dtype, device=device)
        self._bias: Tensor | None = None

    def fill(self, first_output: int, rows: Rows) -> None:
        weight = self._dequantize(rows)
        self._weight[first_output : first_output + len(weight)] = weight

    def finish(self, bias: Tensor | None) -> None:
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self._weight, self._bias)
        return y if self._activation is None else gated_activation(y, self._activation)

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes


def require_rows(x: Tensor, inputs: int, dtype: torch.dtype) -> None:
    """Raises: ValueError: x is not [num_rows, inputs] in a dtype."""
    if x.dtype is not dtype or x.shape[1] != inputs:
        raise ValueError(
            f"x is {list(x.shape)} in {x.dtype}; the matrix has {inputs} columns in {dtype}."
        )
