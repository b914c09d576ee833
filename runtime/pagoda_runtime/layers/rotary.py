"""Rotary position embedding, with the frequencies of each rope type."""

from __future__ import annotations

import math

import torch

from pagoda_runtime.layers.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> torch.Tensor:
    """[rotary_dim / 2] fp32: radians per position of each pair of dimensions that are rotated.

    They are the same for all positions and all sequences, because rotated keys stay in the cache
    and are shared. Types that depend on the length (dynamic, longrope) take max_model_len, the
    longest sequence that the engine serves: docs/decisions/0005-rope-by-longest-sequence.md.
    """
    theta, rotary_dim = rope.theta, int(head_dim * rope.partial_rotary_factor)
    if rope.rope_type == "dynamic":
        theta = _dynamic_theta(rope, rotary_dim, max_model_len)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / theta**exponents
    match rope.rope_type:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3_frequencies(rope, frequencies)
        case "yarn":
            return _yarn_frequencies(rope, frequencies)
        case "longrope":
            is_long = max_model_len > rope.original_max_position_embeddings
            return frequencies / torch.tensor(rope.long_factors if is_long else rope.short_factors)
    return frequencies


def _dynamic_theta(rope: RopeConfig, rotary_dim: int, max_model_len: int) -> float:
    """The base that stretches the longest wave over max_model_len, and the shortest not at all.

    Source: "Dynamically Scaled RoPE" (NTK-aware), by emozilla and bloc97, 2023.
    """
    growth = max(1.0, max_model_len / rope.original_max_position_embeddings)
    stretch = rope.factor * growth - (rope.factor - 1.0)
    return rope.theta * stretch ** (rotary_dim / (rotary_dim - 2))


def _llama3_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Short waves stay, long ones are divided by the factor, those between are blended.

    Source: Llama 3.1's reference code, `apply_scaling`.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, share.clamp(0.0, 1.0))


def _yarn_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """As llama3, but blended evenly by dimension and not by the number of turns.

    Source: Peng et al., YaRN, 2023, section 3.2 ("NTK-by-parts").
    """
    num_pairs = len(frequencies)

    def pair_with_turns(turns: float) -> float:
        """The pair, in fractions, that turns so often in the original context."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return num_pairs * math.log(wavelength) / math.log(rope.theta)

    first, last = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The published code bounds the last one by the head's dimensions, twice the number of pairs.
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    pairs = torch.arange(num_pairs, dtype=torch.float32)
    share = ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return torch.lerp(frequencies, frequencies / rope.factor, share)
