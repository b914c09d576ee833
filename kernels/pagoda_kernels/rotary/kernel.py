"""rotary as a Triton kernel: a program for some tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch

# Of a program, one for each thread: to reduce a large angle takes many registers.
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
    angles = positions * frequencies
    cos, sin = tl.cos(angles) * factor, tl.sin(angles) * factor
    inside = (tokens < num_tokens) & (pairs < NUM_PAIRS)
    first = tokens * (2 * NUM_PAIRS) + pairs
    tl.store(cos_ptr + first, cos, inside)
    tl.store(cos_ptr + first + NUM_PAIRS, cos, inside)
    tl.store(sin_ptr + first, -sin, inside)
    tl.store(sin_ptr + first + NUM_PAIRS, sin, inside)
