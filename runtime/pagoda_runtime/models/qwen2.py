"""Qwen2: Llama with biases on q, k and v, and a sliding window in the upper layers if asked for."""

from __future__ import annotations

from dataclasses import replace

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.llama import llama


def qwen_sliding_windows(file: ConfigFile, num_layers: int) -> tuple[int, ...]:
    """Windows of Qwen2 and Qwen3: `layer_types` decides, or else `max_window_layers`."""
    if not file.boolean("use_sliding_window", False) or file.values.get("sliding_window") is None:
        return (0,) * num_layers
    window = file.integer("sliding_window")
    layer_types = file.values.get("layer_types")
    if layer_types is None:
        first = file.values.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise file.invalid("max_window_layers", first, "an integer of at least 0")
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    return windows_of_layer_types(file, num_layers, window)


def windows_of_layer_types(file: ConfigFile, num_layers: int, window: int) -> tuple[int, ...]:
    """The window of each layer, from the list `layer_types`."""
    layer_types = file.values["layer_types"]
    known = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(layer_type in known for layer_type in layer_types)
    ):
        raise file.invalid(
            "layer_types", layer_types, f"a list of {num_layers} of {', '.join(known)}"
        )
    return tuple(known[layer_type] for layer_type in layer_types)


def qwen2(file: ConfigFile) -> ModelConfig:
    """Qwen2ForCausalLM"""
    config = llama(file)
    return replace(
        config,
        architecture="Qwen2ForCausalLM",
        sliding_windows=qwen_sliding_windows(file, config.num_layers),
        qkv_bias=True,
        attention_output_bias=False,
        mlp_bias=False,
    )
