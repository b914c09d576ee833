"""What the engine knows about a model, read from its config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagoda_runtime.config import SUPPORTED_DTYPES
from pagoda_runtime.config_file import ConfigFile

DTYPE_OF_WEIGHTS = "auto"

Note = tuple[int, str]
"""A level of `logging`, and a message."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder, as data. The families of `models/` differ in these values only."""

    architecture: str
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
    dtype: str = "bfloat16"
    """dtype of the checkpoint; DTYPE_OF_WEIGHTS until the weights are seen, if no file names it"""
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
    quantization: str | None = None
    """What the layers' matrices are rounded to when they are loaded: int8, or nothing."""
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    """What the log of the start should tell of the model's files."""

    @property
    def doubling_depth(self) -> int:
        """Position whose token takes twice the multiplications of the first one.

        Those of the layers' matrices are the same for each token; in a layer that sees all, each
        earlier token adds two products of a head's size for each head.
        """
        attention = self.num_heads * self.head_dim
        matrices = self.hidden_size * (
            2 * attention + 2 * self.num_kv_heads * self.head_dim + 3 * self.intermediate_size
        )
        num_full_layers = sum(1 for window in self.sliding_windows if not window)
        if num_full_layers == 0:
            return 1 << 60
        return self.num_layers * matrices // (2 * attention * num_full_layers)


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
