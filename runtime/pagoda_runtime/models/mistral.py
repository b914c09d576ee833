"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.llama import llama


def mistral(file: ConfigFile) -> ModelConfig:
    """MistralForCausalLM; a sliding_window of null means full attention."""
    config = llama(file)
    window = 0
    # An absent key has transformers' default; null switches the window off.
    if file.values.get("sliding_window", 4096) is not None:
        window = file.integer("sliding_window", 4096)
    return replace(
        config,
        architecture="MistralForCausalLM",
        sliding_windows=(window,) * config.num_layers,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
    )
