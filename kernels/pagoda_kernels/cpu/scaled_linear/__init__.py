"""Products with a matrix of e4m3 in panels, on a CPU: see `pagoda_kernels.cpu.panels`.

Its numbers are widened to bf16, exactly, in registers, and rows of x are not rounded. A block's sum
is multiplied by its scales in fp32; so the result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.cpu.packed_linear import GATES
from pagoda_kernels.cpu.packed_linear.kernel import NO_GATE
from pagoda_kernels.cpu.packing import columns_of
from pagoda_kernels.cpu.panel_memory import PANEL_MEMORY
from pagoda_kernels.cpu.panels import E4M3, GROUP_SIZE, PANEL_SIZE, has_panels
from pagoda_kernels.cpu.scaled_linear import kernel
from pagoda_kernels.quantized_linear import QuantizedLinear, require_rows
from pagoda_kernels.scaled_linear import Scaled, ScaledShape

# How `panels` takes apart 64 bytes of a step: 4 times 4 columns of each panel.
_PLACES, _RUNS = 4, PANEL_SIZE // 4


def has_scaled_panels(shape: ScaledShape, dtype: torch.dtype) -> bool:
    """Whether this processor multiplies by such a matrix in panels."""
    is_even = shape.inputs % 2 == 0 == shape.group_size % 2
    is_e4m3 = shape.dtype is torch.float8_e4m3fn
    return is_e4m3 and is_even and dtype is torch.bfloat16 and has_panels(E4M3)


class PanelScaledLinear(QuantizedLinear[Scaled]):
    """See `QuantizedLinear`; x and the result are bf16.

    Args:
        shape: for which `has_scaled_panels`; outputs are those of gate and up together.
        activation: a name of GATES, if the matrix stacks gate and up.
    """

    are_rows_alike = True

    def __init__(self, shape: ScaledShape, activation: str | None = None) -> None:
        self._shape, self._num_parts = shape, 1 if activation is None else 2
        self._gate = GATES[activation] if activation else NO_GATE
        self.out_features = shape.outputs // self._num_parts
        num_pairs = -(-self.out_features // (GROUP_SIZE // self._num_parts))
        num_blocks = -(-shape.inputs // shape.group_size)
        # Two numbers of each column.
        size = num_pairs, shape.inputs // 2, GROUP_SIZE
        steps = PANEL_MEMORY.zeros(*size, dtype=torch.int16)
        self._panels = steps.view(*steps.shape[:2], _RUNS, 2, _PLACES)
        self._scales = torch.zeros(num_pairs, num_blocks, GROUP_SIZE)
        self._bias = torch.zeros(num_pairs * GROUP_SIZE)

    def fill(self, first_output: int, rows: Scaled) -> None:
        columns = columns_of(first_output, len(rows.numbers), self.out_features, self._num_parts)
        pairs, columns = columns // GROUP_SIZE, columns % GROUP_SIZE
        self._scales[pairs, :, columns] = rows.scales
        panels, columns = columns // PANEL_SIZE, columns % PANEL_SIZE
        places = pairs, slice(None), columns // _PLACES, panels, columns % _PLACES
        self._panels[places] = rows.numbers.contiguous().view(torch.int16)

    def finish(self, bias: Tensor | None) -> None:
        if bias is not None:
            columns = columns_of(0, len(bias), self.out_features, self._num_parts)
            self._bias[columns] = bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        require_rows(x, self._shape.inputs, torch.bfloat16)
        num_rows, inputs = x.shape
        out = torch.empty(num_rows, self.out_features, dtype=torch.bfloat16)
        kernel.multiply(
            self._panels,
            len(self._panels),
            inputs,
            self._shape.group_size,
            self._scales,
            self._bias,
            self._gate,
            self.out_features,
            x.contiguous(),
            num_rows,
            out,
        )
        return out

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self._panels, self._scales, self._bias))
