"""A model as its files describe it: config.json, and what the heads of its safetensors add up to.

Pure, and without the runtime: what both know, the same tests hold together (`tests/contract`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERATORS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Architectures that generate."""
POOLED_FAMILIES = (
    *("Bert", "Roberta", "XLMRoberta", "ModernBert"),
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Gemma3Text"),
)
POOLED_KINDS = ("Model", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification")
POOLED = {f"{family}{kind}" for family in POOLED_FAMILIES for kind in POOLED_KINDS}
"""Architectures that embed or classify."""
DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
# As safetensors name them.
_STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Where config.json names none.
_HEAD_DIMS = {"Qwen3": 128, "Gemma3": 256}
METHODS = ("awq", "gptq", "fp8", "exl2", "gguf", "compressed-tensors")
_SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore", "dynamic")
# What a file says above this is a mistake, and sums of it would fit no status.
_MOST = 2**31 - 1
_MOST_BYTES = 2**60
# The length of a head, in bytes, stands in so many before it.
HEAD_LENGTH_BYTES = 8


class CheckpointError(Exception):
    """The model cannot be served whatever the spec says: one of the engine's reasons, and why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Tensors:
    """What is stored: bytes of all tensors, and the dtype of most of those that are floats."""

    num_bytes: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """How a quantized checkpoint is stored.

    group_sizes: inputs that share a scale, where no module is stored otherwise.
    kv_cache_dtype: the flag that it was made for, if any.
    """

    method: str
    group_sizes: tuple[int, ...] = ()
    kv_cache_dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What preflight needs to know of a model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Positions that the model reaches, with what its rope adds."""
    tie_word_embeddings: bool
    dtype: str
    quantization: Stored | None
    stored_bytes: int | None

    @property
    def generates(self) -> bool:
        return self.architecture in GENERATORS


def read_checkpoint(config: object, tensors: Tensors) -> Checkpoint:
    """The model of a parsed config.json.

    Raises:
        CheckpointError: UnsupportedArchitecture or InvalidModelConfig.
    """
    if not isinstance(config, dict):
        raise CheckpointError("InvalidModelConfig", "config.json must contain a JSON object.")
    architecture = _find_architecture(config)
    num_heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    families = (size for family, size in _HEAD_DIMS.items() if architecture.startswith(family))
    is_tied = config.get("tie_word_embeddings")
    return Checkpoint(
        architecture=architecture,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
        head_dim=_integer(config, "head_dim", next(families, max(1, hidden_size // num_heads))),
        max_position_embeddings=_max_positions(config),
        tie_word_embeddings=architecture.startswith("Gemma3") if is_tied is None else bool(is_tied),
        dtype=_find_dtype(config, tensors),
        quantization=_find_stored(config),
        stored_bytes=tensors.num_bytes,
    )


def read_index(index: object) -> Tensors:
    """What model.safetensors.index.json says; nothing if it does not say it."""
    metadata = index.get("metadata") if isinstance(index, dict) else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    is_size = isinstance(total, int | float) and 0 < total < _MOST_BYTES
    return Tensors(int(total) if is_size else None)  # type: ignore[arg-type]


def read_head(head: object) -> Tensors:
    """What the head of a safetensors file says, a JSON object; nothing if it is none."""
    sizes: dict[str, int] = {}
    for tensor in head.values() if isinstance(head, dict) else ():
        try:
            first, last = tensor["data_offsets"]
            size, dtype = int(last) - int(first), str(tensor["dtype"])
        except (TypeError, ValueError, KeyError, OverflowError):
            # __metadata__ is no tensor.
            continue
        if 0 <= size < _MOST_BYTES:
            sizes[dtype] = sizes.get(dtype, 0) + size
    floats = {_STORED_DTYPES[d]: size for d, size in sizes.items() if d in _STORED_DTYPES}
    return Tensors(sum(sizes.values()) or None, max(floats, key=floats.__getitem__, default=None))


def _find_architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        raise _invalid("architectures", named, "a list with the name of a class")
    for name in named:
        if isinstance(name, str) and (name in GENERATORS or name in POOLED):
            return name
    raise CheckpointError(
        "UnsupportedArchitecture",
        f"config.json: the architecture {_shorten(named[0])} is not supported. Supported: "
        f"{', '.join(GENERATORS)}; *Model and *ForSequenceClassification of "
        f"{', '.join(POOLED_FAMILIES)}. Serve a model of one of these.",
    )


def _max_positions(config: Mapping[str, Any]) -> int:
    named = _integer(config, "max_position_embeddings")
    rope = _mapping(config, "rope_parameters")
    rope = _mapping(rope, "full_attention") or rope
    if not rope or all(isinstance(value, dict) for value in rope.values()):
        rope = _mapping(config, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("dynamic", "yarn"):
        return named
    original = _number(rope, "original_max_position_embeddings") if kind == "yarn" else None
    original = original or named
    reached = original * (_number(rope, "factor") or named / original)
    return max(named, int(min(reached, _MOST)))


def _find_dtype(config: Mapping[str, Any], tensors: Tensors) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        return tensors.dtype or "bfloat16"
    if not isinstance(named, str) or named not in DTYPE_BYTES:
        raise _invalid("dtype", named, f"one of {', '.join(DTYPE_BYTES)}")
    return named


def _find_stored(config: Mapping[str, Any]) -> Stored | None:
    file = _mapping(config, "quantization_config") or _mapping(config, "compression_config")
    if not file:
        return None
    method = file.get("quant_method")
    if method not in METHODS:
        raise _invalid("quantization_config.quant_method", method, f"one of {', '.join(METHODS)}")
    groups = [_mapping(group, "weights") for group in _mapping(file, "config_groups").values()]
    sizes = [part.get("group_size") for part in (file, *groups) if not any(map(file.get, _SKIPPED))]
    made_for = _mapping(file, "kv_cache_scheme")
    kind = "fp8_e4m3" if made_for.get("type", "float") == "float" else "int8"
    return Stored(
        method=str(method),
        group_sizes=tuple(size for size in sizes if type(size) is int and size > 0),
        kv_cache_dtype=kind if made_for else None,
    )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value <= _MOST:
        raise _invalid(key, value, "a positive integer")
    return value


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < math.inf else None  # type: ignore[operator, arg-type]


def _mapping(values: object, key: str) -> Mapping[str, Any]:
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, dict) else {}


def _invalid(key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        "InvalidModelConfig",
        f"config.json: {key} is {_shorten(value)}; it must be {expected}. "
        "Correct the file, or serve another model.",
    )


def _shorten(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except ValueError:
        # Python writes no number of more than some thousand digits.
        return "a number without end"
