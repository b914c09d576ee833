"""Products whose columns are split among programs, so that few rows keep a whole GPU busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.gated_activation.kernel import activate
from pagoda_kernels.launch import launch, num_processors

# A split of fewer steps would not be worth what adding it up costs.
_LEAST_STEPS = 4
_COLUMNS = 512


class Tile(NamedTuple):
    """Of the result, for one program."""

    rows: int
    outputs: int
    num_warps: int
    num_stages: int
    programs: int = 1
    """Of it there should be on each of a GPU's processors, to keep its memory busy; 0: steps are
    never split."""
    most_registers: int | None = None
    """Of a thread. Left alone, NVIDIA's assembler may take fewer and spill."""


def choose_tile(tiles: Sequence[Tile], num_rows: int) -> Tile:
    """The first that has room for all rows, or the last."""
    return next((tile for tile in tiles if num_rows <= tile.rows), tiles[-1])


def choose_grid(
    tile: Tile, num_rows: int, outputs: int, num_steps: int, device: torch.device
) -> tuple[int, int, int]:
    """Tiles of rows and of outputs, and in how many parts the steps of each go to programs of their
    own.
    """
    tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    wanted = triton.cdiv(tile.programs * num_processors(device), tiles[0] * tiles[1])
    return *tiles, max(1, min(wanted, num_steps // _LEAST_STEPS))


def make_sums(
    num_splits: int, num_rows: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What programs write: [num_splits, num_rows, outputs], fp32 if they are to be added up."""
    kept = dtype if num_splits == 1 else torch.float32
    return torch.empty(num_splits, num_rows, outputs, dtype=kept, device=device)


def finish_sums(
    sums: torch.Tensor, bias: torch.Tensor | None, activation: str | None, dtype: torch.dtype
) -> torch.Tensor:
    """The sum over the splits plus bias, [outputs], in a dtype, as gate and up if there is an
    activation; always in the same order. A single split has its bias already.
    """
    num_splits, num_rows, outputs = sums.shape
    if num_splits == 1:
        return sums[0] if activation is None else gated_activation(sums[0], activation)
    size = outputs if activation is None else outputs // 2
    out = torch.empty(num_rows, size, dtype=dtype, device=sums.device)
    launch(
        add_splits_kernel,
        (num_rows, triton.cdiv(size, _COLUMNS)),
        sums,
        bias,
        out,
        num_splits,
        outputs,
        size,
        ACTIVATION=activation,
        BLOCK=_COLUMNS,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_splits"])
def add_splits_kernel(
    sums_ptr, bias_ptr, out_ptr, num_splits, outputs, size,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The program (row, block of columns)."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    sums_ptr += row * outputs + columns
    stride = num_rows.to(tl.int64) * outputs
    out = _add_splits(sums_ptr, bias_ptr, columns, inside, num_splits, stride)
    if ACTIVATION is not None:
        up = _add_splits(sums_ptr + size, bias_ptr, columns + size, inside, num_splits, stride)
        out = activate(out, ACTIVATION) * up
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _add_splits(sums_ptr, bias_ptr, columns, inside, num_splits, stride):
    if bias_ptr is None:
        total = tl.zeros([columns.shape[0]], tl.float32)
    else:
        total = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    for split in range(num_splits):
        total += tl.load(sums_ptr + split * stride, inside, 0.0)
    return total
