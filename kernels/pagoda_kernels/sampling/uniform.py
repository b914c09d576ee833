"""Random numbers that are made from a seed, a position and an attempt alone."""

from __future__ import annotations

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def make_state(seed: int, position: int) -> int:
    """64 bits for the draws with a seed at a position of its sequence."""
    return mix((mix(seed & _MASK64) + (position + 1) * _GOLDEN) & _MASK64)


def uniform(state: int, attempt: int = 0) -> float:
    """A number from 0 to below 1 for an attempt of a draw."""
    return (mix((state + (attempt + 1) * _GOLDEN) & _MASK64) >> 11) / (1 << 53)


def mix(value: int) -> int:
    """64 bits of each 64 bits.

    Source: SplitMix64 of Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    2014.
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
