"""Products with a matrix packed in panels, alone or as a gated layer: see `panels`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pagoda_kernels.cpu.packed_linear import kernel
from pagoda_kernels.cpu.packing import pack
from pagoda_kernels.cpu.panels import (
    BF16,
    BYTES_PER_STEP,
    GROUP_SIZE,
    INT8_AS_BF16,
    PANEL_SIZE,
    has_panels,
)

__all__ = ["GATES", "PackedGate", "PackedMatrix", "can_pack"]

GATES = {"silu": kernel.SILU, "gelu": kernel.GELU, "gelu_pytorch_tanh": kernel.GELU_TANH}
"""The activations that a gate can have."""


def can_pack(matrix: torch.Tensor) -> bool:
    """Whether this processor multiplies by such a matrix of bf16 in panels."""
    if matrix.device.type != "cpu" or matrix.dtype is not torch.bfloat16:
        return False
    whole_steps = matrix.shape[1] * matrix.element_size() % BYTES_PER_STEP == 0
    return whole_steps and has_panels(BF16)


class _Panels(NamedTuple):
    """A matrix as the kernel takes it."""

    panels: torch.Tensor
    bias: torch.Tensor
    """[num_groups * GROUP_SIZE] fp32, what sums begin with."""
    scales: torch.Tensor | None
    """[num_groups * GROUP_SIZE] fp32, what sums are multiplied by, if the numbers are int8."""

    @classmethod
    def make(cls, matrix: torch.Tensor, bias: torch.Tensor, scales: torch.Tensor | None) -> _Panels:
        """Args: matrix: [whole groups, in_features]; bias, scales: [whole groups] fp32."""
        if scales is None:
            return cls(pack(matrix, BF16), bias, None)
        return cls(pack(matrix, INT8_AS_BF16), bias / scales, scales)


class PackedMatrix:
    """x @ matrix.T + bias, computed in fp32 and rounded once.

    Args:
        matrix: [out_features, in_features] bf16 for which `can_pack`, copied; or with scales int8
            between -127 and 127, widened to bf16, exactly, on the way to the product.
        bias: [out_features], or none.
        scales: [out_features] fp32, what each row of an int8 matrix is multiplied by.
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.out_features = len(matrix)
        size = self.out_features + -self.out_features % GROUP_SIZE
        self._panels = _Panels.make(
            _padded(matrix, size),
            _padded_numbers(bias, size),
            None if scales is None else _padded_numbers(scales, size, fill=1.0),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, out_features] bf16 of x, [num_rows, in_features] bf16."""
        return _multiply(x, self._panels, kernel.NO_GATE, self.out_features)


class PackedGate:
    """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias), in fp32 and rounded once.

    Args:
        gate, up: [out_features, in_features], as for `PackedMatrix`.
        activation: a name of GATES.
        gate_bias, up_bias: [out_features], or none.
        scales: of gate and of up, if they are int8.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        *,
        scales: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.out_features, in_features = gate.shape
        size = self.out_features + -self.out_features % PANEL_SIZE

        # A group is a panel of the gate and one of up.
        def by_panel(*pair: torch.Tensor) -> torch.Tensor:
            return torch.stack([part.view(-1, PANEL_SIZE) for part in pair], 1).view(-1)

        rows = [_padded(part, size).view(-1, PANEL_SIZE, in_features) for part in (gate, up)]
        self._panels = _Panels.make(
            torch.cat(rows, 1).view(-1, in_features),
            by_panel(*(_padded_numbers(bias, size) for bias in (gate_bias, up_bias))),
            None
            if scales is None
            else by_panel(*(_padded_numbers(part, size, fill=1.0) for part in scales)),
        )
        self._gate = GATES[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, out_features] bf16 of x, [num_rows, in_features] bf16."""
        return _multiply(x, self._panels, self._gate, self.out_features)


def _multiply(x: torch.Tensor, matrix: _Panels, gate: int, out_features: int) -> torch.Tensor:
    num_rows, in_features = x.shape
    num_groups, num_steps, _, numbers = matrix.panels.shape
    if x.dtype is not torch.bfloat16 or in_features != num_steps * numbers:
        raise ValueError(
            f"x is {list(x.shape)} in {x.dtype}; the matrix has {num_steps * numbers} columns in "
            "bf16."
        )
    x = x.contiguous()
    out = torch.empty(num_rows, out_features, dtype=torch.bfloat16)
    kernel.multiply(
        matrix.panels,
        num_groups,
        x,
        num_rows,
        in_features,
        matrix.bias,
        kernel.NO_SCALES if matrix.scales is None else matrix.scales,
        gate,
        out,
        out_features,
    )
    return out


def _padded(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    """With rows of zeros at the end."""
    missing = num_rows - len(matrix)
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _padded_numbers(numbers: torch.Tensor | None, size: int, fill: float = 0.0) -> torch.Tensor:
    """[size] fp32: filled up where there are none."""
    padded = torch.full((size,), fill)
    if numbers is not None:
        padded[: len(numbers)] = numbers
    return padded
