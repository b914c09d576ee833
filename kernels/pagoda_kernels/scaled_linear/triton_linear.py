"""The product on a GPU that multiplies numbers of 8 bits: of rows that are rounded to the same."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.kv_cache import FORMATS, LARGEST, LEAST
from pagoda_kernels.launch import compute_capability, launch
from pagoda_kernels.norm.kernel import num_warps
from pagoda_kernels.quantized_linear import QuantizedLinear, require_rows
from pagoda_kernels.scaled_linear import GROUP_SIZE, Rounding, Scaled, ScaledShape
from pagoda_kernels.scaled_linear.kernel import round_kernel, scaled_product_kernel
from pagoda_kernels.split_sums import Tile, choose_grid, choose_tile, finish_sums, make_sums

# A group of columns, where the matrix has several.
_STEP_COLUMNS = GROUP_SIZE
# From so many rows on torch's product of e4m3, where it takes such scales.
_TORCH_FROM_ROWS = 17
# What torch's product wants both sizes of a matrix to be multiples of.
_TORCH_SIZES = 16

_GROUPED_TILES = (
    Tile(16, 128, 8, 3),
    Tile(64, 64, 4, 4, programs=2),
    Tile(128, 64, 4, 3),
)
# The largest has no registers left for sums of groups, nor for sums of splits in fp32. With four
# warps it spills before compute capability 9.0.
_TILES = (*_GROUPED_TILES, Tile(128, 128, 8, 3, programs=0))


class TritonScaledLinear(QuantizedLinear[Scaled]):
    """Of a matrix as checkpoints have it."""

    def __init__(
        self,
        shape: ScaledShape,
        rounding: Rounding,
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        assert (input_scale is not None) == (rounding is Rounding.STATIC)
        self._shape, self._input_scale = shape, input_scale
        self._dtype, self._activation = dtype, activation
        self._numbers = torch.zeros(shape.outputs, shape.inputs, dtype=shape.dtype, device=device)
        self._num_groups = triton.cdiv(shape.inputs, shape.group_size)
        groups = self._num_groups, shape.outputs
        self._scales = torch.zeros(groups, dtype=torch.float32, device=device)
        self._bias: Tensor | None = None
        self._has_torch = (
            shape.dtype is torch.float8_e4m3fn
            and dtype is torch.bfloat16
            and has_torch_product(shape, compute_capability(device))
        )

    def fill(self, first_output: int, rows: Scaled) -> None:
        own = slice(first_output, first_output + len(rows.numbers))
        # torch does not copy every tensor of 8-bit floats.
        self._numbers.view(torch.uint8)[own] = rows.numbers.view(torch.uint8)
        self._scales[:, own] = rows.scales.T

    def finish(self, bias: Tensor | None) -> None:
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        require_rows(x, self._shape.inputs, self._dtype)
        num_rows = len(x)
        if not self._has_torch or num_rows < _TORCH_FROM_ROWS:
            return self._multiply(*self._round(x.contiguous()))
        if self._num_groups > 1:
            # torch wants the scales of groups in whole 16 bytes.
            x = pad(x, (0, 0, 0, -num_rows % _TORCH_SIZES))
        return self._multiply_by_torch(*self._round(x.contiguous()))[:num_rows]

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
        tile = choose_tile(_TILES if self._num_groups == 1 else _GROUPED_TILES, num_rows)
        num_steps = triton.cdiv(inputs, _STEP_COLUMNS)
        grid = choose_grid(tile, num_rows, outputs, num_steps, x.device)
        num_splits = grid[2]
        sums = make_sums(num_splits, num_rows, outputs, self._dtype, x.device)
        launch(
            scaled_product_kernel,
            grid,
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
            # Its sums have 14 bits; rounding to e4m3 costs ten times as much at 14,336 columns.
            use_fast_accum=self._num_groups == 1,
        )
        if self._bias is not None:
            out += self._bias
        return out if self._activation is None else gated_activation(out, self._activation)


def has_torch_product(shape: ScaledShape, capability: tuple[int, int]) -> bool:
    """Whether `torch._scaled_mm` takes a scale for each row and output, or for each of their groups
    of 128 columns: the latter on Hopper alone, from CUDA 12.9 on.
    """
    if shape.outputs % _TORCH_SIZES or shape.inputs % _TORCH_SIZES:
        return False
    if shape.group_size == shape.inputs:
        return capability >= (9, 0)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    is_whole = shape.inputs % shape.group_size == 0 == shape.outputs % shape.group_size
    return capability == (9, 0) and cuda >= (12, 9) and is_whole
