"""Rotary position embedding, with the frequencies of the rope types default, linear and llama3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pagoda_runtime.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32: radians per position of each pair of dimensions.

    llama3 leaves short wavelengths alone, divides long ones by the factor and blends in between.
    Source: Llama 3.1's reference code, `apply_scaling`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    assert rope.rope_type == "llama3", rope.rope_type
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, share.clamp(0.0, 1.0))


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """cos and sin of a step's tokens, [num_tokens, 1, head_dim] fp32.

    sin is negated in its first half, so that rotating is `x * cos + swap_halves(x) * sin`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def compute(cls, positions: torch.Tensor, frequencies: torch.Tensor) -> RotaryAngles:
        """positions: [num_tokens]; frequencies: [head_dim / 2] fp32."""
        angles = positions[:, None, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def apply_rotary(x: torch.Tensor, angles: RotaryAngles) -> torch.Tensor:
    """x: [num_tokens, num_heads, head_dim], rotated by each token's angles; the result is fp32."""
    swapped = torch.roll(x, x.shape[-1] // 2, -1)
    return (x * angles.cos).addcmul_(swapped, angles.sin)
