"""Models whose kernels are compiled and whose speed is measured, as far as their shape goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import ARCHITECTURES

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "eos_token_id": 151645,
}

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.1-8b": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "eos_token_id": 128001,
        },
        "qwen3-8b": {
            **_QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        "qwen3-0.6b": {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "gemma-3-270m": {
            "architectures": ["Gemma3ForCausalLM"],
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "eos_token_id": 1,
        },
        # Phi-3's checkpoints are not read yet; its shape is that of a Llama with 96 to a head.
        "phi-3-mini": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "eos_token_id": 32000,
        },
    }
)
"""config.json of each, as far as it determines the computation."""


def model_config(name: str, **settings: Any) -> ModelConfig:
    """Of a shape, in bf16; settings override fields of config.json."""
    values = {**SHAPES[name], "dtype": "bfloat16", **settings}
    (architecture,) = values["architectures"]
    return ARCHITECTURES[architecture](ConfigFile(Path(name), values))


def shortened(name: str) -> ModelConfig:
    """With one layer of each kind: the others launch the same kernels."""
    kinds = list(dict.fromkeys(SHAPES[name].get("layer_types", ())))
    layers = {"layer_types": kinds} if kinds else {}
    return model_config(name, num_hidden_layers=max(1, len(kinds)), **layers)
