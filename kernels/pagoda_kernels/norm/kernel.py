"""norm and add_and_norm as one Triton kernel: a program for each row, which stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch
from pagoda_kernels.norm import NormWeights, RMSNormWeights


def add_and_norm_triton(
    total: torch.Tensor,
    x: torch.Tensor | None,
    of_x: NormWeights | None,
    of_total: NormWeights | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `pagoda_kernels.norm.add_and_norm`; without x nothing is added. dtype: of the norm."""
    num_rows, size = total.shape
    out = None if of_total is None else total.new_empty(total.shape, dtype=dtype)
    block = triton.next_power_of_2(size)
    launch(
        _add_and_norm_kernel,
        [num_rows],
        total,
        x,
        out,
        *_pointers(of_x),
        *_pointers(of_total),
        size,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return total if out is None else out


def _pointers(weights: NormWeights | None) -> tuple[object, ...]:
    """weight, bias, floor, eps; a norm has a bias or a floor."""
    if weights is None:
        return None, None, None, 0.0
    if isinstance(weights, RMSNormWeights):
        return weights.weight, None, weights.floor, 0.0
    return weights.weight, weights.bias, None, weights.eps


def num_warps(block: int) -> int:
    """Of a row of so many numbers: 8 for each thread, of which one load brings 4 in fp32."""
    return min(16, max(1, block // 256))


@triton.jit
def _add_and_norm_kernel(
    total_ptr, x_ptr, out_ptr,
    x_weight_ptr, x_bias_ptr, x_floor_ptr, x_eps,
    weight_ptr, bias_ptr, floor_ptr, eps,
    size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    offsets = tl.program_id(0).to(tl.int64) * size + columns
    total = tl.load(total_ptr + offsets, inside, 0.0)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        if x_weight_ptr is not None:
            x = _normed(x, x_weight_ptr, x_bias_ptr, x_floor_ptr, x_eps, columns, size)
        total += x
        tl.store(total_ptr + offsets, total, inside)
    if out_ptr is not None:
        out = _normed(total, weight_ptr, bias_ptr, floor_ptr, eps, columns, size)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _normed(x, weight_ptr, bias_ptr, floor_ptr, eps, columns, size):
    """The norm of a row whose columns from size on are 0."""
    inside = columns < size
    weight = tl.load(weight_ptr + columns, inside, 0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, inside, 0.0)
        # The sum of squares of differences: that of squares minus the mean's would cancel.
        x = tl.where(inside, x - tl.sum(x) / size, 0.0)
        return x * tl.rsqrt(tl.sum(x * x) / size + eps) * weight + bias
    else:
        floor = tl.load(floor_ptr)
        return x * tl.rsqrt(tl.sum(x * x) + floor * floor) * weight
