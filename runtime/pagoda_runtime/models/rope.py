"""The rotary position embedding of a layer, read from config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pagoda_runtime.config_file import ConfigFile, is_positive
from pagoda_runtime.errors import FatalError
from pagoda_runtime.layers.rope_config import RopeConfig


def read_rope(
    file: ConfigFile,
    head_dim: int,
    layer_type: str = "full_attention",
    *,
    default_theta: float = 10_000.0,
    is_partial: bool = False,
) -> RopeConfig:
    """The rope of one layer type.

    Both spellings are read: `rope_parameters` (one for all layers or one for each layer type), and
    the older `rope_theta` with `rope_scaling`.

    Args:
        is_partial: whether the family heeds `partial_rotary_factor`.
    """
    parameters = dict(file.mapping("rope_parameters"))
    key = "rope_parameters"
    if isinstance(parameters.get(layer_type), dict):
        key = f"rope_parameters.{layer_type}"
        parameters = dict(parameters[layer_type])
    elif not parameters or all(isinstance(value, dict) for value in parameters.values()):
        key = "rope_scaling"
        parameters = dict(file.mapping("rope_scaling"))
    parameters.setdefault("rope_theta", file.number("rope_theta", default_theta))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise FatalError(
            "InvalidModelConfig",
            f"{file.path}: {key} has the rope type {rope_type!r}, which this engine does not "
            f"support. Supported: {', '.join(ROPE_TYPES)}. Serve a checkpoint with one of these.",
        )
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0 and not (is_partial and is_positive(factor) and factor < 1.0):
        expected = "above 0 and at most 1" if is_partial else "1.0 or absent"
        raise file.invalid(f"{key}.partial_rotary_factor", factor, expected)
    rope = ROPE_TYPES[rope_type](_Parameters(file, key, parameters, int(head_dim * factor)))
    return replace(rope, partial_rotary_factor=factor)


def max_positions(file: ConfigFile, rope: RopeConfig) -> int:
    """Positions that a model with this rope reaches.

    Files with dynamic rope name the original positions, those with yarn often do; the rope reaches
    `factor` times as many.
    """
    named = file.integer("max_position_embeddings")
    if rope.rope_type not in ("dynamic", "yarn"):
        return named
    return max(named, int(rope.factor * rope.original_max_position_embeddings))


class _Parameters(ConfigFile):
    """One rope's object in config.json; errors name file, key and value."""

    def __init__(
        self, file: ConfigFile, key: str, values: Mapping[str, Any], rotary_dim: int
    ) -> None:
        super().__init__(file.path, values)
        self.file = file
        self.key = key
        self.rotary_dim = rotary_dim

    def invalid(self, key: str, value: object, expected: str) -> FatalError:
        return super().invalid(f"{self.key}.{key}", value, expected)

    @property
    def theta(self) -> float:
        theta = self.number("rope_theta")
        # The types below divide by its logarithm.
        if theta <= 1.0:
            raise self.invalid("rope_theta", theta, "above 1")
        return theta

    def original_positions(self) -> int:
        positions = self.file.integer("max_position_embeddings")
        original = self.number("original_max_position_embeddings", positions)
        if original < 2:
            raise self.invalid("original_max_position_embeddings", original, "at least 2")
        return int(original)

    def divisors(self, name: str) -> tuple[float, ...]:
        """A positive number for each pair of dimensions that are rotated."""
        values: Any = self.values.get(name)
        count = self.rotary_dim // 2
        fits = isinstance(values, list) and len(values) == count and all(map(is_positive, values))
        if not fits:
            raise self.invalid(name, values, f"a list of {count} positive numbers")
        return tuple(map(float, values))


def _dynamic(parameters: _Parameters) -> RopeConfig:
    return RopeConfig(
        parameters.theta,
        "dynamic",
        parameters.number("factor"),
        original_max_position_embeddings=parameters.file.integer("max_position_embeddings"),
    )


def _llama3(parameters: _Parameters) -> RopeConfig:
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        raise parameters.invalid("high_freq_factor", high, f"above low_freq_factor, {low}")
    factor, original = parameters.number("factor"), parameters.original_positions()
    return RopeConfig(parameters.theta, "llama3", factor, low, high, original)


def _yarn(parameters: _Parameters) -> RopeConfig:
    original = parameters.original_positions()
    # DeepSeek's files leave the factor out.
    positions = parameters.file.integer("max_position_embeddings")
    factor = parameters.number("factor", positions / original)
    fast, slow = parameters.number("beta_fast", 32.0), parameters.number("beta_slow", 1.0)
    if fast <= slow:
        raise parameters.invalid("beta_fast", fast, f"above beta_slow, {slow}")
    growth = _yarn_scale(factor, 1.0)
    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        growth = _yarn_scale(factor, parameters.number("mscale"))
        growth /= _yarn_scale(factor, parameters.number("mscale_all_dim"))
    truncate = parameters.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise parameters.invalid("truncate", truncate, "true or false")
    return RopeConfig(
        parameters.theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        attention_factor=parameters.number("attention_factor", growth),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    """What keeps the entropy of attention over a longer context.

    Source: Peng et al., YaRN, 2023, section 3.4.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(parameters: _Parameters) -> RopeConfig:
    positions = parameters.file.integer("max_position_embeddings")
    # Phi 3's files name the original positions outside of the rope's object.
    original = parameters.file.integer(
        "original_max_position_embeddings", parameters.original_positions()
    )
    if original < 2:
        raise parameters.file.invalid("original_max_position_embeddings", original, "at least 2")
    factor = parameters.number("factor", positions / original)
    growth = 1.0
    if factor > 1.0:
        growth = math.sqrt(1.0 + math.log(factor) / math.log(original))
    return RopeConfig(
        parameters.theta,
        "longrope",
        factor,
        original_max_position_embeddings=original,
        attention_factor=parameters.number("attention_factor", growth),
        short_factors=parameters.divisors("short_factor"),
        long_factors=parameters.divisors("long_factor"),
    )


ROPE_TYPES: dict[str, Callable[[_Parameters], RopeConfig]] = {
    "default": lambda parameters: RopeConfig(parameters.theta),
    "linear": lambda parameters: RopeConfig(
        parameters.theta, "linear", parameters.number("factor")
    ),
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
