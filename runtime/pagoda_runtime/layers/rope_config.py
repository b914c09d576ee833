"""What a rotary position embedding is made of; without torch, for those who only read configs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of a layer; `models/rope.py` reads it from config.json."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    """How many times longer than the original the context is."""
    low_freq_factor: float = 1.0
    """llama3: turns in the original context below which a frequency is divided in full."""
    high_freq_factor: float = 4.0
    """llama3: turns above which it is left alone."""
    original_max_position_embeddings: int = 8192
    """Positions that the model was trained on before its context was made longer."""
    attention_factor: float = 1.0
    """yarn, longrope: factor on cos and sin."""
    beta_fast: float = 32.0
    """yarn: turns in the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: turns below which it is divided in full."""
    truncate: bool = True
    """yarn: whether the two are rounded to whole pairs of dimensions, outwards."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies if no sequence outgrows the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisors if some sequence may."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions that are rotated, the first ones."""
