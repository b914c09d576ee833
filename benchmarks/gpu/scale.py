"""How large what is measured is: on a GPU, and in a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of a run of `make gpu-bench`."""

    dtype: torch.dtype = torch.bfloat16
    read_bytes: int = 4 << 30
    repeats: int = 20
    decode_seqs: int = 32
    decode_tokens: int = 8192
    prefill_tokens: int = 8192
    product_shape: tuple[int, int] = (4096, 14336)
    """Inputs and outputs."""
    product_rows: tuple[int, ...] = (1, 16, 64, 256, 512, 2048)
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json beside those of Llama 3.1 8B."""
    max_model_len: int = 9216
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Of every engine."""
    num_requests: int = 256
    request_tokens: tuple[int, int] = (100, 1024)
    """Of a prompt, and of what is generated, at least and at most."""
    static_batch: int = 64
    """Requests that transformers' generate gets."""
    generate_seconds: float = 60.0
    """After which it is stopped."""
    batching_seconds: float = 45.0
    """After which transformers' continuous batching is stopped."""
    batching: Mapping[str, int] = field(default_factory=dict)
    """Its settings; by default it takes what memory is free."""
    itl_seqs: int = 16
    itl_contexts: tuple[int, int] = (1024, 8192)
    output_tokens: tuple[int, int] = (16, 144)
    """Generated in the shorter and in the longer of two runs whose difference is measured."""


FULL = Scale()
TINY = Scale(
    dtype=torch.float32,
    read_bytes=1 << 22,
    decode_seqs=2,
    decode_tokens=64,
    prefill_tokens=64,
    product_shape=(128, 96),
    product_rows=(1, 16, 2048),
    model={
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": 2,
    },
    max_model_len=256,
    flags={"kv_cache_memory_bytes": 1 << 26, "dtype": "float32"},
    num_requests=4,
    request_tokens=(4, 12),
    static_batch=2,
    batching_seconds=30.0,
    batching={"num_blocks": 64, "max_batch_tokens": 64},
    itl_seqs=2,
    itl_contexts=(16, 64),
    output_tokens=(2, 6),
)
