"""Products with a matrix packed in panels, alone or as gate and up of a layer: see `panels`."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from pagoda_kernels.cpu.packed_linear import kernel
from pagoda_kernels.cpu.packing import pack
from pagoda_kernels.cpu.panels import BF16, BYTES_PER_STEP, GROUP_SIZE, has_panels
from pagoda_kernels.quantized_linear import require_rows

GATES = {"silu": kernel.SILU, "gelu": kernel.GELU, "gelu_pytorch_tanh": kernel.GELU_TANH}
"""The activations that a gate can have."""


def can_pack(matrix: torch.Tensor) -> bool:
    """Whether this processor multiplies by such a matrix of bf16 in panels."""
    if matrix.device.type != "cpu" or matrix.dtype is not torch.bfloat16:
        return False
    whole_steps = matrix.shape[1] * matrix.element_size() % BYTES_PER_STEP == 0
    return whole_steps and has_panels(BF16)


class PackedLinear:
    """x @ weight.T + bias; with an activation, of a weight that stacks gate and up,
    activation(gate) * up. Computed in fp32 and rounded once.

    Args:
        weight: [out_features, in_features] bf16 for which `can_pack`, copied.
        bias: [out_features], or none.
        activation: a name of GATES.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        num_parts = 1 if activation is None else 2
        self._gate = kernel.NO_GATE if activation is None else GATES[activation]
        self.out_features, self._in_features = len(weight) // num_parts, weight.shape[1]
        # A group has rows of each part: with an activation a panel of the gate, and one of up.
        num_rows = GROUP_SIZE // num_parts
        missing = -self.out_features % num_rows

        def in_groups(rows: torch.Tensor) -> torch.Tensor:
            parts = torch.unflatten(rows, 0, (num_parts, -1))
            if missing:
                parts = pad(parts, (0, 0) * (rows.dim() - 1) + (0, missing))
            return torch.unflatten(parts, 1, (-1, num_rows)).transpose(0, 1).flatten(0, 2)

        self._bias = in_groups(torch.zeros(len(weight)) if bias is None else bias.float())
        self._panels = pack(in_groups(weight), BF16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, outputs] bf16 of x, [num_rows, in_features] bf16."""
        require_rows(x, self._in_features, torch.bfloat16)
        num_rows, in_features = x.shape
        x = x.contiguous()
        out = torch.empty(num_rows, self.out_features, dtype=torch.bfloat16)
        kernel.multiply(
            self._panels,
            len(self._panels),
            x,
            num_rows,
            in_features,
            self._bias,
            self._gate,
            out,
            self.out_features,
        )
        return out
