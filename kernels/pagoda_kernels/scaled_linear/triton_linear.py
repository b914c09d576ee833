"""The product on a GPU that multiplies numbers of 8 bits: of rows that are rounded to the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.kv_cache import FORMATS, LARGEST, LEAST
from pagoda_kernels.launch import compute_capability, launch
from pagoda_kernels.norm.kernel import num_warps
from pagoda_kernels.scaled_linear import GROUP_SIZE, Rounding, Scaled, ScaledLinear, ScaledShape
from pagoda_kernels.scaled_linear.kernel import round_kernel, scaled_product_kernel
from pagoda_kernels.split_sums import choose_splits, finish_sums, make_sums

# A group of columns, where the matrix has several.
_STEP_COLUMNS = GROUP_SIZE
# From so many rows on torch's product of e4m3, where it takes a scale for each row and output.
_TORCH_FROM_ROWS = 65
# What torch's product wants both sizes of a matrix to be multiples of.
_TORCH_SIZES = 16


class Tile(NamedTuple):
    """Of the result, for one program."""

    rows: int
    outputs: int
    num_warps: int
    num_stages: int


# The largest has no registers left for sums of groups.
_GROUPED_TILES = (Tile(16, 64, 4, 4), Tile(64, 128, 8, 3))
_TILES = (*_GROUPED_TILES, Tile(128, 128, 8, 3))


class TritonScaledLinear(ScaledLinear):
    """Of a matrix as checkpoints have it."""

    def __init__(
        self,
        shape: ScaledShape,
        rounding: Rounding,
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
    ) -> None:
        self._shape, self._rounding = shape, rounding
        self._dtype, self._activation = dtype, activation
        self._numbers = torch.empty(shape.outputs, shape.inputs, dtype=shape.dtype, device=device)
        self._num_groups = triton.cdiv(shape.inputs, shape.group_size)
        groups = self._num_groups, shape.outputs
        self._scales = torch.empty(groups, dtype=torch.float32, device=device)
        self._bias: Tensor | None = None
        self._input_scale: Tensor | None = None
        is_even = shape.outputs % _TORCH_SIZES == 0 == shape.inputs % _TORCH_SIZES
        self._has_torch = (
            shape.dtype is torch.float8_e4m3fn
            and dtype is torch.bfloat16
            and self._num_groups == 1
            and is_even
            and compute_capability(device) >= (9, 0)
        )

    def fill(self, first_output: int, rows: Scaled) -> None:
        own = slice(first_output, first_output + len(rows.numbers))
        # torch does not copy every tensor of 8-bit floats.
        self._numbers.view(torch.uint8)[own] = rows.numbers.view(torch.uint8)
        self._scales[:, own] = rows.scales.T

    def finish(self, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        assert (input_scale is not None) == (self._rounding is Rounding.STATIC)
        self._bias, self._input_scale = bias, input_scale

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not self._dtype or x.shape[1] != self._shape.inputs:
            raise ValueError(
                f"x is {list(x.shape)} in {x.dtype}; the matrix has {self._shape.inputs} columns "
                f"in {self._dtype}."
            )
        numbers, scales = self._round(x.contiguous())
        if self._has_torch and len(x) >= _TORCH_FROM_ROWS:
            return self._multiply_by_torch(numbers, scales)
        return self._multiply(numbers, scales)

    @property
    def num_bytes(self) -> int:
        return self._numbers.nbytes + self._scales.nbytes

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x in 8 bits, and scales, [num_groups, num_rows]."""
        num_rows, inputs = x.shape
        dtype, group_size = self._shape.dtype, self._shape.group_size
        numbers = torch.empty(num_rows, inputs, dtype=dtype, device=x.device)
        scales = torch.empty(self._num_groups, num_rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(group_size)
        launch(
            round_kernel,
            (num_rows, self._num_groups),
            x,
            numbers.view(torch.uint8),
            scales,
            self._input_scale,
            inputs,
            LARGEST=LARGEST[dtype],
            LEAST=LEAST,
            FORMAT=FORMATS[dtype],
            GROUP_SIZE=group_size,
            BLOCK=block,
            num_warps=num_warps(block),
        )
        return numbers, scales

    def _multiply(self, x: Tensor, x_scales: Tensor) -> Tensor:
        num_rows, (outputs, inputs) = len(x), self._numbers.shape
        choice = _TILES if self._num_groups == 1 else _GROUPED_TILES
        tile = next((tile for tile in choice if num_rows <= tile.rows), choice[-1])
        tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(outputs, tile.outputs)
        num_steps = triton.cdiv(inputs, _STEP_COLUMNS)
        num_splits = choose_splits(tiles[0] * tiles[1], tile.num_warps, num_steps, x.device)
        sums = make_sums(num_splits, num_rows, outputs, self._dtype, x.device)
        launch(
            scaled_product_kernel,
            (*tiles, num_splits),
            x,
            x_scales,
            self._numbers,
            self._scales,
            self._bias if num_splits == 1 else None,
            sums,
            num_rows,
            inputs,
            outputs,
            num_steps,
            IS_GROUPED=self._num_groups > 1,
            IS_PADDED=inputs % _STEP_COLUMNS != 0,
            COLUMNS=_STEP_COLUMNS,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return finish_sums(sums, self._bias, self._activation, self._dtype)

    def _multiply_by_torch(self, x: Tensor, x_scales: Tensor) -> Tensor:
        out = torch._scaled_mm(
            x,
            self._numbers.T,
            scale_a=x_scales.T,
            scale_b=self._scales,
            out_dtype=torch.bfloat16,
        )
        if self._bias is not None:
            out += self._bias
        return out if self._activation is None else gated_activation(out, self._activation)
