"""The product on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.grouped_linear import Grouped, GroupedShape
from pagoda_kernels.grouped_linear.kernel import SCALE_UNIT, product_kernel, widen_kernel
from pagoda_kernels.grouped_linear.packing import TILE, Packing, pack
from pagoda_kernels.launch import launch
from pagoda_kernels.quantized_linear import QuantizedLinear, require_rows
from pagoda_kernels.split_sums import Tile, choose_grid, choose_tile, finish_sums, make_sums

# A matrix is as high as whole tiles of every height.
_PADDED_OUTPUTS = 128
# From so many rows on, torch's product gains more than widening the matrix for it costs: see
# README.md. Earlier where only the smallest tiles are taken.
_WIDEN_FROM_ROWS, _WIDEN_SMALL_FROM_ROWS = 256, 64
# Of a widened part of the matrix, which a GPU's second cache then holds.
_WIDENED_BYTES = 32 << 20

# Small ones for few rows: each processor has several programs, which hide each other's waits. From
# 17 rows on larger ones, as each program reads all of its rows.
_TILES = (
    Tile(8, 64, 2, 3, programs=6, most_registers=128),
    Tile(16, 64, 2, 3, programs=6),
    Tile(32, 128, 4, 3, programs=2),
    Tile(64, 128, 8, 3),
)
# Those have no room, in registers or Blackwell's memory for sums, for steps of more.
_MOST_COLUMNS, _MOST_GROUPS = 128, 4
_LARGE_STEP_TILES = (Tile(8, 64, 2, 2, programs=6),)


class TritonGroupedLinear(QuantizedLinear[Grouped]):
    """Of a matrix in words. Scales are kept in fp16, in fp32 for a model in fp32; zeros likewise,
    and rounded to the model's dtype, which whole ones are not changed by.
    """

    def __init__(
        self,
        shape: GroupedShape,
        packing: Packing,
        dtype: torch.dtype,
        device: torch.device,
        activation: str | None = None,
        *,
        is_symmetric: bool = False,
    ) -> None:
        self._shape, self._packing, self._dtype, self._activation = (
            shape,
            packing,
            dtype,
            activation,
        )
        self._num_steps = packing.num_steps(shape.inputs)
        self._padded_outputs = triton.cdiv(shape.outputs, _PADDED_OUTPUTS) * _PADDED_OUTPUTS
        tiles = (self._padded_outputs // TILE, self._num_steps, packing.words, TILE, packing.lanes)
        self._words = torch.zeros(tiles, dtype=torch.int16, device=device)
        groups = (triton.cdiv(shape.inputs, shape.group_size), self._padded_outputs)
        kept = torch.float32 if dtype is torch.float32 else torch.float16
        self._scales = torch.zeros(groups, dtype=kept, device=device)
        self._zeros = None if is_symmetric else torch.zeros(groups, dtype=kept, device=device)
        num_groups = packing.runs // packing.group_runs
        is_small = packing.columns <= _MOST_COLUMNS and num_groups <= _MOST_GROUPS
        # Without tensor cores, fp32 has no registers for them either.
        is_small &= dtype is not torch.float32
        self._tiles = _TILES if is_small else _LARGE_STEP_TILES
        self._widen_from = _WIDEN_FROM_ROWS if is_small else _WIDEN_SMALL_FROM_ROWS
        self._bias: Tensor | None = None

    def fill(self, first_output: int, rows: Grouped) -> None:
        own = torch.arange(
            first_output, first_output + len(rows.integers), device=self._words.device
        )
        words = self._words.permute(0, 3, 1, 2, 4)
        words[own // TILE, own % TILE] = pack(rows.integers, self._packing)
        scales = (rows.scales / SCALE_UNIT.value).to(self._scales.dtype)
        if not torch.isfinite(scales).all():
            raise ValueError(
                f"A scale is {rows.scales.abs().max().item()}; those of quantized matrices are "
                f"below {torch.finfo(scales.dtype).max * SCALE_UNIT.value:.0f} on a GPU."
            )
        self._scales[:, own] = scales.T
        if self._zeros is not None:
            middle = torch.tensor(2.0 ** (self._shape.bits - 1), device=own.device)
            zeros = middle if rows.zeros is None else rows.zeros.T
            self._zeros[:, own] = zeros.to(self._zeros.dtype)
        assert rows.zeros is None or self._zeros is not None

    def finish(self, bias: Tensor | None) -> None:
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        require_rows(x, self._shape.inputs, self._dtype)
        x = x.contiguous()
        return self._multiply_widened(x) if len(x) >= self._widen_from else self._multiply(x)

    @property
    def num_bytes(self) -> int:
        zeros = 0 if self._zeros is None else self._zeros.nbytes
        return self._words.nbytes + self._scales.nbytes + zeros

    def _multiply(self, x: Tensor) -> Tensor:
        num_rows, outputs = len(x), self._shape.outputs
        tile = choose_tile(self._tiles, num_rows)
        grid = choose_grid(tile, num_rows, outputs, self._num_steps, x.device)
        num_splits = grid[2]
        sums = make_sums(num_splits, num_rows, outputs, self._dtype, x.device)
        launch(
            product_kernel,
            grid,
            x,
            self._words,
            self._scales,
            self._zeros,
            self._bias if num_splits == 1 else None,
            sums,
            num_rows,
            self._shape.inputs,
            outputs,
            self._padded_outputs,
            self._num_steps,
            **self._constants,
            IS_PADDED=self._shape.inputs % self._packing.columns != 0,
            OUTPUTS=tile.outputs,
            MOST_ROWS=tile.rows,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.most_registers,
        )
        return finish_sums(sums, self._bias, self._activation, self._dtype)

    def _multiply_widened(self, x: Tensor) -> Tensor:
        inputs, outputs = self._shape.inputs, self._shape.outputs
        piece = max(1, _WIDENED_BYTES // (inputs * x.itemsize) // TILE) * TILE
        piece = min(piece, self._padded_outputs)
        out = x.new_empty(len(x), outputs)
        weight = x.new_empty(piece, inputs)
        for first in range(0, outputs, piece):
            part = slice(first, min(first + piece, outputs))
            self._widen(first, weight)
            columns = weight[: part.stop - first].T
            if self._bias is None:
                torch.mm(x, columns, out=out[:, part])
            else:
                torch.addmm(self._bias[part], x, columns, out=out[:, part])
        return out if self._activation is None else gated_activation(out, self._activation)

    def _widen(self, first: int, weight: Tensor) -> None:
        """Write the rows from `first` on; those of whole tiles that there are."""
        num_tiles = min(len(weight), self._padded_outputs - first) // TILE
        launch(
            widen_kernel,
            (self._num_steps, num_tiles),
            self._words,
            self._scales,
            self._zeros,
            weight,
            first,
            self._shape.inputs,
            self._padded_outputs,
            self._num_steps,
            **self._constants,
            num_warps=4,
        )

    @property
    def _constants(self) -> dict[str, Any]:
        return {
            "BITS": self._packing.bits,
            "IS_E4M3": self._packing.is_e4m3,
            "LANES": self._packing.lanes,
            "STEP_RUNS": self._packing.runs,
            "STEP_WORDS": self._packing.words,
            "GROUP_RUNS": self._packing.group_runs,
            "GROUP_SIZE": self._shape.group_size,
            "TILE": TILE,
        }
