"""rotary as a Triton kernel: a program for some tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch

# Of a program, one for each thread.
_ANGLES = 128


def rotary_triton(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pagoda_kernels.rotary.rotary`."""
    num_tokens, num_pairs = len(positions), len(frequencies)
    cos, sin = frequencies.new_empty(2, num_tokens, 1, 2 * num_pairs).unbind()
    pairs = triton.next_power_of_2(num_pairs)
    tokens = max(1, _ANGLES // pairs)
    launch(
        _rotary_kernel,
        [triton.cdiv(num_tokens, tokens)],
        positions,
        frequencies,
        cos,
        sin,
        num_tokens,
        factor,
        NUM_PAIRS=num_pairs,
        TOKENS=tokens,
        PAIRS=pairs,
        num_warps=_ANGLES // 32,
    )
    return cos, sin


@triton.jit
def _rotary_kernel(
    positions_ptr, frequencies_ptr, cos_ptr, sin_ptr,
    num_tokens, factor,
    NUM_PAIRS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    pairs = tl.arange(0, PAIRS)[None, :]
    positions = tl.load(positions_ptr + tokens, tokens < num_tokens, 0).to(tl.float32)
    frequencies = tl.load(frequencies_ptr + pairs, pairs < NUM_PAIRS, 0.0)
    cos, sin = _cos_and_sin(positions * frequencies)
    cos, sin = cos * factor, sin * factor
    inside = (tokens < num_tokens) & (pairs < NUM_PAIRS)
    first = tokens * (2 * NUM_PAIRS) + pairs
    tl.store(cos_ptr + first, cos, inside)
    tl.store(cos_ptr + first + NUM_PAIRS, cos, inside)
    tl.store(sin_ptr + first, -sin, inside)
    tl.store(sin_ptr + first + NUM_PAIRS, sin, inside)


@triton.jit
def _cos_and_sin(x):
    """Within 1e-7. The GPU's own keep large angles in memory while they reduce them."""
    # In fp64 the rest is exact enough for every position that fp32 holds.
    quarters = x.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    # In [-pi / 4, pi / 4], where a few terms of the series do.
    rest = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    square = rest * rest
    cos = 2.4433157e-5 * square - 1.3887316e-3
    cos = (cos * square + 4.1666646e-2) * square - 0.5
    cos = cos * square + 1.0
    sin = (-1.9515296e-4 * square + 8.3321609e-3) * square - 1.6666655e-1
    sin = sin * square * rest + rest
    quarter = whole.to(tl.int32) & 3
    is_swapped = (quarter & 1) == 1
    cos, sin = tl.where(is_swapped, sin, cos), tl.where(is_swapped, cos, sin)
    is_negative = (quarter == 1) | (quarter == 2)
    return tl.where(is_negative, -cos, cos), tl.where(quarter >= 2, -sin, sin)
