"""What the engine knows about a model, read from its config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagoda_runtime.config import SUPPORTED_DTYPES
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.models.pooler_config import PoolerConfig
from pagoda_runtime.quantization.description import Quantization

DTYPE_OF_WEIGHTS = "auto"

Note = tuple[int, str]
"""A level of `logging`, and a message."""


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """Tables that are added to those of tokens."""

    num_rows: int
    """Of the table of positions."""
    first: int
    """The row of a text's first token."""
    num_segments: int
    """Rows of the table that tells the texts of a pair apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model, as data. The families of `models/` differ in these values only."""

    architecture: str
    names: Mapping[str, str]
    """Part of a parameter's name, or the whole of its module's → what the family's checkpoints say
    for it, if they differ."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    """Positions that the model reaches, with what its rope adds."""
    activation: str
    """silu, gelu or gelu_pytorch_tanh"""
    tie_word_embeddings: bool
    rope: tuple[RopeConfig, ...]
    """One for each layer."""
    sliding_windows: tuple[int, ...]
    """Tokens that each layer sees, itself included; 0: all."""
    has_tied_head: bool = False
    """Whether the checkpoint has the tied table once more, quantized; seen from the weights."""
    dtype: str = "bfloat16"
    """dtype of the checkpoint; DTYPE_OF_WEIGHTS until the weights are seen, if no file names it"""
    computed_weights: tuple[str, ...] = ()
    """Last parts of the names of what some checkpoints carry and every engine computes itself."""
    norm: str = "rms"
    """rms or layer"""
    is_gated: bool = True
    """Whether the feed-forward layers have a gate."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    """A norm after attention and after the feed-forward too, before each is added back."""
    norm_weight_offset: float = 0.0
    """Gemma stores the weights of its norms minus one."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor on q·k; None: head_dim ** -0.5."""
    pooler: PoolerConfig | None = None
    """What is made of a text's hidden states, by a model that generates nothing."""
    is_causal: bool = True
    """Whether a token sees no later one."""
    learned_positions: LearnedPositions | None = None
    """Instead of a rope."""
    norm_bias: bool = True
    """Whether norms of the kind layer have one."""
    embeddings_are_normed: bool = False
    """Whether the layers add to the first norm's results."""
    prefix: str = ""
    """What some of the family's checkpoints begin all names with."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Part of a checkpoint's name → the matrices of one size that lie in it, along the outputs."""
    quantization: Quantization | None = None
    """How the layers' matrices are stored, or what they are made when they are loaded."""
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    """What the log of the start should tell of the model's files."""

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a parameter of the model."""
        module, _, last = name.rpartition(".")
        if module in self.names:
            return f"{self.names[module]}.{last}"
        parts = (self.names.get(part, part) for part in name.split("."))
        return ".".join(part for part in parts if part)


def common_fields(file: ConfigFile, default_head_dim: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that all families of Llama's kind spell in the same way.

    Args:
        default_head_dim: where the file names none; None: hidden_size divided by the heads.
    """
    num_heads = file.integer("num_attention_heads")
    num_kv_heads = file.integer("num_key_value_heads", num_heads)
    hidden_size = file.integer("hidden_size")
    if num_heads % num_kv_heads:
        raise file.invalid("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads}")
    if default_head_dim is None:
        if file.values.get("head_dim") is None and hidden_size % num_heads:
            raise file.invalid("hidden_size", hidden_size, f"a multiple of {num_heads} heads")
        default_head_dim = hidden_size // num_heads
    head_dim = file.integer("head_dim", default_head_dim)
    if head_dim % 2:
        raise file.invalid("head_dim", head_dim, "even")
    dtype_key = "dtype" if file.values.get("dtype") is not None else "torch_dtype"
    return {
        "vocab_size": file.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": file.integer("intermediate_size"),
        "num_layers": file.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": file.number("rms_norm_eps", 1e-6),
        "max_position_embeddings": file.integer("max_position_embeddings"),
        "dtype": file.choice(dtype_key, DTYPE_OF_WEIGHTS, SUPPORTED_DTYPES),
    }
