"""Products with a bf16 matrix packed in panels, alone or as a gated layer: see `panels`."""

from __future__ import annotations

import torch

from pagoda_kernels.packed_linear import cpu
from pagoda_kernels.panels import BYTES_PER_STEP, GROUP_SIZE, PANEL_SIZE, has_panels, pack

__all__ = ["GATES", "PackedGate", "PackedMatrix", "can_pack"]

GATES = {"silu": cpu.SILU, "gelu": cpu.GELU, "gelu_pytorch_tanh": cpu.GELU_TANH}
"""The activations that a gate can have."""


def can_pack(matrix: torch.Tensor) -> bool:
    """Whether this processor multiplies by such a matrix in panels."""
    if matrix.device.type != "cpu" or matrix.dtype is not torch.bfloat16:
        return False
    whole_steps = matrix.shape[1] * matrix.element_size() % BYTES_PER_STEP == 0
    return whole_steps and has_panels(matrix.dtype)


class PackedMatrix:
    """x @ matrix.T + bias, computed in fp32 and rounded once.

    Args:
        matrix: [out_features, in_features] bf16 for which `can_pack`; copied.
        bias: [out_features], or none.
    """

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features = len(matrix)
        self._panels = pack(matrix)
        self._bias = _padded(bias, self.out_features, len(self._panels) * GROUP_SIZE)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, out_features] bf16 of x, [num_rows, in_features] bf16."""
        return _multiply(x, self._panels, self._bias, cpu.NO_GATE, self.out_features)


class PackedGate:
    """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias), in fp32 and rounded once.

    Args:
        gate, up: [out_features, in_features] bf16 for which `can_pack`; copied.
        gate_bias, up_bias: [out_features], or none.
        activation: a name of GATES.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> None:
        self.out_features, in_features = gate.shape
        missing = -self.out_features % PANEL_SIZE
        padded = [torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (gate, up)]
        panels = [part.view(-1, PANEL_SIZE, in_features) for part in padded]
        self._panels = pack(torch.cat(panels, 1).view(-1, in_features))
        size = self.out_features + missing
        halves = [
            _padded(bias, self.out_features, size).view(-1, PANEL_SIZE)
            for bias in (gate_bias, up_bias)
        ]
        self._bias = torch.cat(halves, 1).contiguous()
        self._gate = GATES[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, out_features] bf16 of x, [num_rows, in_features] bf16."""
        return _multiply(x, self._panels, self._bias, self._gate, self.out_features)


def _multiply(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor, gate: int, out_features: int
) -> torch.Tensor:
    num_rows, in_features = x.shape
    num_groups, num_steps, _, numbers = panels.shape
    if x.dtype is not torch.bfloat16 or in_features != num_steps * numbers:
        raise ValueError(
            f"x is {list(x.shape)} in {x.dtype}; the matrix has {num_steps * numbers} columns in "
            "bf16."
        )
    x = x.contiguous()
    out = torch.empty(num_rows, out_features, dtype=torch.bfloat16)
    cpu.multiply(
        panels.data_ptr(),
        num_groups,
        x.data_ptr(),
        num_rows,
        in_features,
        bias.data_ptr(),
        gate,
        out.data_ptr(),
        out_features,
    )
    return out


def _padded(bias: torch.Tensor | None, out_features: int, size: int) -> torch.Tensor:
    """[size] fp32: zeros where there is no bias."""
    padded = torch.zeros(size)
    if bias is not None:
        padded[:out_features] = bias
    return padded
