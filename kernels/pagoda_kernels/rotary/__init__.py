"""What the heads of a step's tokens are rotated by."""

from __future__ import annotations

import torch

from pagoda_kernels.launch import uses_triton
from pagoda_kernels.rotary.reference import rotary_reference


def rotary(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position times each frequency, times a factor.

    Args:
        positions: [num_tokens] int64.
        frequencies: [rotary_dim / 2] fp32, radians per position.
    Returns: [num_tokens, 1, rotary_dim] fp32 each, as `rotate_and_store` takes them: two halves of
        the same numbers, but that sin is negated in its first half.
    """
    if uses_triton(positions.device):
        from pagoda_kernels.rotary.kernel import rotary_triton

        return rotary_triton(positions, frequencies, factor)
    return rotary_reference(positions, frequencies, factor)
