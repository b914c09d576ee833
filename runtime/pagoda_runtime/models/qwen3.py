"""Qwen3: Llama with a norm on each head of q and k."""

from __future__ import annotations

from dataclasses import replace

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.llama import llama
from pagoda_runtime.models.qwen2 import qwen_sliding_windows


def qwen3(file: ConfigFile) -> ModelConfig:
    """Qwen3ForCausalLM"""
    # Not hidden_size / num_attention_heads: the published checkpoints use 128 throughout.
    config = llama(file, default_head_dim=128)
    return replace(
        config,
        architecture="Qwen3ForCausalLM",
        sliding_windows=qwen_sliding_windows(file, config.num_layers),
        mlp_bias=False,
        qk_norm=True,
    )
