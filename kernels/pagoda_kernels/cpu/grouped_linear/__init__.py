"""Products with a matrix of whole numbers that share scales in groups, in panels, on a CPU.

Rows of x are rounded to 8 bits as well, each block of at most BLOCK_SIZE inputs with a scale of its
own, and the processor multiplies whole numbers: some 0.6 % of error where they are normally
distributed. The way of computing is one for all numbers of rows, so a row's bits do not depend on
its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda_kernels.cpu.grouped_linear import kernel
from pagoda_kernels.cpu.grouped_linear.dot import (
    HEAD_BYTES,
    SCALES_BYTES,
    first_plane,
    step_bytes,
    steps_per_turn,
)
from pagoda_kernels.cpu.packed_linear import GATES
from pagoda_kernels.cpu.packed_linear.kernel import NO_GATE
from pagoda_kernels.cpu.packing import columns_of
from pagoda_kernels.cpu.panel_memory import PANEL_MEMORY
from pagoda_kernels.cpu.panels import BYTES_PER_STEP, GROUP_SIZE, INT8, has_panels
from pagoda_kernels.grouped_linear import Grouped, GroupedShape
from pagoda_kernels.quantized_linear import QuantizedLinear, require_rows

BLOCK_SIZE = 128
"""Inputs whose products are added up as whole numbers, at most."""

# Of fp16's largest numbers, and of a multiplier in fp32.
_HALF_EXPONENT, _LEAST_EXPONENT = 15, -120


def has_grouped_panels(shape: GroupedShape, dtype: torch.dtype) -> bool:
    """Whether this processor multiplies by such a matrix in panels."""
    return shape.bits in kernel.WIDTHS and dtype is torch.bfloat16 and has_panels(INT8)


class PanelGroupedLinear(QuantizedLinear[Grouped]):
    """See `QuantizedLinear`; x and the result are bf16.

    Args:
        shape: for which `has_grouped_panels`; outputs are those of gate and up together.
        activation: a name of GATES, if the matrix stacks gate and up.
        is_symmetric: no rows have zeros.
    """

    are_rows_alike = True

    def __init__(
        self, shape: GroupedShape, activation: str | None = None, *, is_symmetric: bool = False
    ) -> None:
        num_parts = 1 if activation is None else 2
        self._shape, self._num_parts, self._is_symmetric = shape, num_parts, is_symmetric
        self.out_features = shape.outputs // num_parts
        num_groups = shape.inputs // shape.group_size
        self._blocks_per_group = -(-shape.group_size // BLOCK_SIZE)
        turn_inputs = steps_per_turn(shape.bits) * BYTES_PER_STEP
        block_size = turn_inputs * -(-shape.group_size // (self._blocks_per_group * turn_inputs))
        num_blocks = num_groups * self._blocks_per_group
        num_pairs = -(-self.out_features // (GROUP_SIZE // num_parts))
        self._multiply = kernel.MULTIPLY[shape.bits]
        # Scales lie before the numbers that they scale, unless a row has but one.
        scales_bytes = SCALES_BYTES if is_symmetric else 2 * SCALES_BYTES
        first_byte = 0 if num_groups == 1 else scales_bytes
        block_bytes = first_byte + block_size // BYTES_PER_STEP * step_bytes(shape.bits)
        size = num_pairs, num_blocks, block_bytes
        self._panels = PANEL_MEMORY.zeros(*size, dtype=torch.uint8)
        scales = self._panels[..., :scales_bytes]
        if num_groups == 1:
            scales = torch.zeros(num_pairs, 1, scales_bytes, dtype=torch.uint8)
        self._scales = scales.view(torch.float16)
        self._multipliers = torch.ones(num_pairs * GROUP_SIZE)
        self._bias = torch.zeros(num_pairs * GROUP_SIZE)
        self._row_bytes = num_blocks * (HEAD_BYTES + block_size)
        matrix = kernel.Matrix(
            panels=self._panels.data_ptr(),
            num_pairs=num_pairs,
            pair_bytes=num_blocks * block_bytes,
            bits=shape.bits,
            steps_per_turn=steps_per_turn(shape.bits),
            first_plane=first_plane(shape.bits),
            num_blocks=num_blocks,
            block_size=block_size,
            block_bytes=block_bytes,
            first_byte=first_byte,
            scales=self._scales.data_ptr(),
            scales_pair_bytes=self._scales.stride(0) * 2,
            scales_block_bytes=0 if num_groups == 1 else block_bytes,
            has_zeros=int(not is_symmetric),
            zero=1 << shape.bits - 1 if is_symmetric else 0,
            inputs=shape.inputs,
            group_size=shape.group_size,
            blocks_per_group=self._blocks_per_group,
            bias=self._bias.data_ptr(),
            multipliers=self._multipliers.data_ptr(),
            gate=GATES[activation] if activation else NO_GATE,
            outputs=self.out_features,
        )
        self._matrix = torch.tensor(matrix)

    def fill(self, first_output: int, rows: Grouped) -> None:
        integers = rows.integers.contiguous()
        num_rows, inputs = integers.shape
        assert integers.dtype is torch.uint8
        assert inputs == self._shape.inputs
        kernel.fill(self._matrix, integers, first_output, num_rows)
        columns = columns_of(first_output, num_rows, self.out_features, self._num_parts)
        multipliers, scales = _in_halves(rows.scales)
        self._multipliers[columns] = multipliers
        parts = [scales]
        if not self._is_symmetric:
            middle = torch.full_like(scales, 2.0 ** (self._shape.bits - 1))
            parts.append(middle if rows.zeros is None else rows.zeros)
        else:
            assert rows.zeros is None
        pairs, columns = columns // GROUP_SIZE, columns % GROUP_SIZE
        for i, part in enumerate(parts):
            if part.shape[1] > 1:
                part = part.repeat_interleave(self._blocks_per_group, 1)
            self._scales[pairs, :, columns + i * GROUP_SIZE] = part.half()

    def finish(self, bias: Tensor | None) -> None:
        if bias is not None:
            columns = columns_of(0, len(bias), self.out_features, self._num_parts)
            self._bias[columns] = bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        require_rows(x, self._shape.inputs, torch.bfloat16)
        num_rows = len(x)
        x = x.contiguous()
        is_rounded = num_rows * torch.get_num_threads() > kernel.FEW_ROWS
        if is_rounded:
            rounded = torch.empty(num_rows, self._row_bytes, dtype=torch.uint8)
            kernel.round_rows(self._matrix, x, 0, num_rows, rounded)
            x = rounded
        out = torch.empty(num_rows, self.out_features, dtype=torch.bfloat16)
        self._multiply(self._matrix, x, int(is_rounded), num_rows, out)
        return out

    @property
    def num_bytes(self) -> int:
        parts = self._panels, self._multipliers, self._bias
        own_scales = 0 if self._shape.inputs > self._shape.group_size else self._scales.nbytes
        return sum(part.nbytes for part in parts) + own_scales


def _in_halves(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers of the rows, and what is left of their scales for fp16: all their digits.

    Powers of two, which bring a row's largest scale near to fp16's largest number; a row's only
    scale is a multiplier itself.
    """
    if scales.shape[1] == 1:
        multipliers = scales[:, 0]
    else:
        exponents = torch.frexp(scales.abs().amax(1)).exponent - _HALF_EXPONENT
        multipliers = torch.ldexp(torch.ones(len(scales)), exponents.clamp(min=_LEAST_EXPONENT))
    return multipliers, scales / multipliers.masked_fill(multipliers == 0, 1)[:, None]
