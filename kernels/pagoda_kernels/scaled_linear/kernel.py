"""Rows rounded to 8 bits, and their products with a matrix of the same."""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda_kernels.rotate_and_store.kernel import encode


@triton.jit
def round_kernel(
    x_ptr, numbers_ptr, scales_ptr, input_scale_ptr,
    inputs,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The program (row, group): its numbers, as bytes, and its scale.

    scales: [num_groups, num_rows]. input_scale: [], or None: by the largest number.
    """
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK)
    columns = group * GROUP_SIZE + within
    inside = (within < GROUP_SIZE) & (columns < inputs)
    x = tl.load(x_ptr + row * inputs + columns, inside, 0.0).to(tl.float32)
    if input_scale_ptr is None:
        most = tl.maximum(tl.max(tl.abs(x)), LEAST)
        factor, scale = tl.div_rn(LARGEST, most), tl.div_rn(most, LARGEST)
    else:
        scale = tl.load(input_scale_ptr)
        factor = tl.div_rn(1.0, scale)
    tl.store(scales_ptr + group * num_rows + row, scale)
    tl.store(numbers_ptr + row * inputs + columns, encode(x, factor, LARGEST, FORMAT), inside)


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
def scaled_product_kernel(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr,
    num_rows, inputs, outputs, num_steps,
    IS_GROUPED: tl.constexpr, IS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The program (rows, outputs, split): sums over a part of the steps of COLUMNS each.

    x_scales [num_groups, num_rows], scales [num_groups, outputs]: of one group, or of each step.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    size = tl.cdiv(num_steps, num_splits)
    first = split * size
    last = tl.minimum(first + size, num_steps)
    columns = tl.arange(0, COLUMNS)
    # What is not there is something that is, so that loads need no mask: rows from the first on, as
    # many programs that read one row would wait for each other.
    some_rows, some_own = rows % num_rows, tl.minimum(own, outputs - 1)
    x_at = x_ptr + (some_rows.to(tl.int64) * inputs)[None, :] + columns[:, None]
    weight_at = weight_ptr + (some_own.to(tl.int64) * inputs)[:, None] + columns[None, :]
    IS_INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INTEGER else tl.float32
    IS_WHOLE: tl.constexpr = IS_INTEGER and not IS_GROUPED
    acc = tl.zeros([OUTPUTS, ROWS], SUM if IS_WHOLE else tl.float32)
    for step in tl.range(first, last):
        column = step * COLUMNS
        if IS_PADDED:
            inside = columns < inputs - column
            x = tl.load(x_at + column, inside[:, None], 0.0)
            weight = tl.load(weight_at + column, inside[None, :], 0.0)
        else:
            x = tl.load(x_at + column)
            weight = tl.load(weight_at + column)
        if IS_WHOLE:
            acc = tl.dot(weight, x, acc, out_dtype=SUM)
        else:
            # Sums of more products of e4m3 would lose digits in Hopper's tensor cores.
            part = tl.dot(weight, x, out_dtype=SUM).to(tl.float32)
            if IS_GROUPED:
                part *= tl.load(scales_ptr + step * outputs + some_own)[:, None]
                part *= tl.load(x_scales_ptr + step * num_rows + some_rows)[None, :]
            acc += part
    out = acc.to(tl.float32)
    if not IS_GROUPED:
        out *= tl.load(scales_ptr + some_own)[:, None]
        out *= tl.load(x_scales_ptr + some_rows)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + some_own).to(tl.float32)[:, None]
    out_at = out_ptr + (split.to(tl.int64) * num_rows + rows)[None, :] * outputs + own[:, None]
    within = (rows < num_rows)[None, :] & (own < outputs)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), within)
