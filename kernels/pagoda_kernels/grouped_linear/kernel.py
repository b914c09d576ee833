"""Products of few rows with a matrix in words, and the matrix widened for products of many."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from pagoda_kernels.grouped_linear.widen import load_words, widen

SCALE_UNIT: tl.constexpr = tl.constexpr(2.0**-8)
"""What scales are kept in units of: fp16 holds those from 2e-7 to 255 in full."""


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
def product_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    num_rows, inputs, outputs, padded_outputs, num_steps,
    BITS: tl.constexpr, IS_E4M3: tl.constexpr, LANES: tl.constexpr, STEP_RUNS: tl.constexpr,
    STEP_WORDS: tl.constexpr, GROUP_RUNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    IS_PADDED: tl.constexpr, TILE: tl.constexpr, OUTPUTS: tl.constexpr, MOST_ROWS: tl.constexpr,
):  # fmt: skip
    """The program (rows, outputs, split): sums over a part of the steps.

    The matrix is the product's first factor, which tensor cores take from registers, where numbers
    are widened; a group's sum is multiplied by its scales, and not each of its numbers.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = TILE * LANES
    ROWS: tl.constexpr = tile_rows(MOST_ROWS)
    rows = tl.program_id(0) * MOST_ROWS + tl.arange(0, ROWS)
    own = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    size = tl.cdiv(num_steps, num_splits)
    first = split * size
    last = tl.minimum(first + size, num_steps)
    lanes = tl.arange(0, LANES)
    words_at = (own // TILE).to(tl.int64) * num_steps * (STEP_WORDS * WORDS) + own % TILE * LANES
    words_at = words_ptr + words_at[:, None] + lanes[None, :]
    has_row = (rows < num_rows)[None, :]
    x_at = x_ptr + (rows.to(tl.int64) * inputs)[None, :] + lanes[:, None]
    acc = tl.full([OUTPUTS, ROWS], 0.0, tl.float32)
    # fmt: off
    scales = load_groups(
        scales_ptr, own, first, inputs, padded_outputs, STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
    zeros = load_groups(
        zeros_ptr, own, first, inputs, padded_outputs, STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
    # fmt: on
    for step in tl.range(first, last):
        step_at = words_at + step * (STEP_WORDS * WORDS)
        for start in tl.static_range(0, STEP_RUNS, GROUP_RUNS):
            if zeros_ptr is None:
                zero = None
            else:
                zero = zeros[start // GROUP_RUNS].to(DTYPE)[:, None]
            part = tl.full([OUTPUTS, ROWS], 0.0, tl.float32)
            for run in tl.static_range(start, start + GROUP_RUNS):
                words = load_words(step_at, run, BITS, WORDS)
                column = (step * STEP_RUNS + run) * LANES
                if IS_PADDED:
                    x = tl.load(x_at + column, (lanes < inputs - column)[:, None] & has_row, 0.0)
                else:
                    x = tl.load(x_at + column, has_row, 0.0)
                weights = widen(words, zero, run, BITS, IS_E4M3, DTYPE)
                part = tl.dot(weights, x, part, input_precision="ieee")
            acc += part * scales[start // GROUP_RUNS].to(tl.float32)[:, None]
        # Of the next step, so that its products do not wait for them.
        after = tl.minimum(step + 1, num_steps - 1)
        # fmt: off
        scales = load_groups(
            scales_ptr, own, after, inputs, padded_outputs,
            STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
        zeros = load_groups(
            zeros_ptr, own, after, inputs, padded_outputs,
            STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
        # fmt: on
    acc = acc * SCALE_UNIT
    inside = own < outputs
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + own, inside, 0.0).to(tl.float32)[:, None]
    out_at = out_ptr + (split.to(tl.int64) * num_rows + rows)[None, :] * outputs + own[:, None]
    within = (rows < num_rows)[None, :] & inside[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), within)


@triton.jit(do_not_specialize=["num_steps"])
def widen_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr,
    first_output, inputs, padded_outputs, num_steps,
    BITS: tl.constexpr, IS_E4M3: tl.constexpr, LANES: tl.constexpr, STEP_RUNS: tl.constexpr,
    STEP_WORDS: tl.constexpr, GROUP_RUNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The program (step, tile of outputs): its columns in the result's dtype."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    WORDS: tl.constexpr = TILE * LANES
    step, tile = tl.program_id(0), tl.program_id(1)
    rows, lanes = tl.arange(0, TILE), tl.arange(0, LANES)
    own = first_output + tile * TILE + rows
    step_at = (first_output // TILE + tile).to(tl.int64) * num_steps + step
    step_at = words_ptr + step_at * (STEP_WORDS * WORDS) + rows[:, None] * LANES + lanes[None, :]
    out_at = out_ptr + (tile * TILE + rows).to(tl.int64)[:, None] * inputs + lanes[None, :]
    # fmt: off
    scales = load_groups(
        scales_ptr, own, step, inputs, padded_outputs, STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
    zeros = load_groups(
        zeros_ptr, own, step, inputs, padded_outputs, STEP_RUNS, LANES, GROUP_RUNS, GROUP_SIZE)
    # fmt: on
    for run in tl.static_range(STEP_RUNS):
        if zeros_ptr is None:
            zero = None
        else:
            zero = zeros[run // GROUP_RUNS].to(DTYPE)[:, None]
        words = load_words(step_at, run, BITS, WORDS)
        numbers = widen(words, zero, run, BITS, IS_E4M3, DTYPE)
        scale = scales[run // GROUP_RUNS].to(tl.float32)[:, None] * SCALE_UNIT
        column = (step * STEP_RUNS + run) * LANES
        numbers = (numbers.to(tl.float32) * scale).to(DTYPE)
        tl.store(out_at + column, numbers, (lanes < inputs - column)[None, :])


@triton.constexpr_function
def tile_rows(most_rows: int) -> int:
    """AMD's tensor cores take 16 rows at least; those that are too many are another program's, too,
    which writes the same.
    """
    target = target_info.current_target()
    return max(16, most_rows) if target is not None and target.backend == "hip" else most_rows


@triton.jit
def load_groups(
    groups_ptr, own, step, inputs, padded_outputs,
    STEP_RUNS: tl.constexpr, LANES: tl.constexpr, GROUP_RUNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Scales or zeros of some outputs, a tuple: of each group of a step's columns."""
    found = ()
    if groups_ptr is not None:
        for start in tl.static_range(0, STEP_RUNS, GROUP_RUNS):
            column = (step * STEP_RUNS + start) * LANES
            # A step may reach beyond the matrix, and beyond its groups.
            group = tl.minimum(column, inputs - 1) // GROUP_SIZE
            found += (tl.load(groups_ptr + group * padded_outputs + own),)  # type: ignore[assignment]
    return found
