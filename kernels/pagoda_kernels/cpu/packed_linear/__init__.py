"""Products with a matrix packed in panels, alone or as gate and up of a layer: see `panels`."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from pagoda_kernels.cpu.packed_linear import kernel
from pagoda_kernels.cpu.packing import make_panels, pack
from pagoda_kernels.cpu.panels import BF16, BYTES_PER_STEP, GROUP_SIZE, has_panels
from pagoda_kernels.quantized_linear import require_rows

GATES = {"silu": kernel.SILU, "gelu": kernel.GELU, "gelu_pytorch_tanh": kernel.GELU_TANH}
"""The activations that a gate can have."""
_PIECE_BYTES = 8 << 20
"""Of a weight that is brought into order beside it."""


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
        num_groups = -(-self.out_features // num_rows)

        def in_groups(rows: torch.Tensor, groups: range) -> torch.Tensor:
            some = slice(groups.start * num_rows, groups.stop * num_rows)
            parts = torch.unflatten(rows, 0, (num_parts, -1))[:, some]
            if missing := len(groups) * num_rows - parts.shape[1]:
                parts = pad(parts, (0, 0) * (rows.dim() - 1) + (0, missing))
            return torch.unflatten(parts, 1, (-1, num_rows)).transpose(0, 1).flatten(0, 2)

        bias = torch.zeros(len(weight)) if bias is None else bias.float()
        self._bias = in_groups(bias, range(num_groups))
        self._panels = make_panels(num_groups, self._in_features, BF16)
        at_once = max(1, _PIECE_BYTES // (self._panels[0].nbytes))
        for first in range(0, num_groups, at_once):
            groups = range(first, min(first + at_once, num_groups))
            pack(in_groups(weight, groups), self._panels[first : groups.stop])

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
