"""ModernBERT: an encoder with rope, gated layers, and windows on both sides in most layers."""

from __future__ import annotations

from collections.abc import Mapping

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.bert import encoder_fields
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.llama import ACTIVATIONS
from pagoda_runtime.models.pooler_config import PoolerLayer, num_labels
from pagoda_runtime.models.qwen2 import windows_of_layer_types
from pagoda_runtime.models.rope import read_rope

_NAMES: Mapping[str, str] = {
    "embed_tokens": "embeddings.tok_embeddings",
    "norm": "final_norm",
    "self_attn": "attn",
    "o_proj": "Wo",
    "attention_norm": "attn_norm",
    # The first layer has none; what it takes is normed already.
    "layers.0.attention_norm": "embeddings.norm",
    "down_proj": "Wo",
}


def modernbert(file: ConfigFile) -> ModelConfig:
    """ModernBertModel"""
    common = encoder_fields(file)
    num_layers = common["num_layers"]
    # Of both sides together; a token itself is in neither.
    window = file.integer("local_attention", 128) // 2 + 1
    if file.values.get("layer_types") is not None:
        windows = windows_of_layer_types(file, num_layers, window)
    else:
        every = file.integer("global_attn_every_n_layers", 3)
        windows = tuple(window if layer % every else 0 for layer in range(num_layers))
    attention_bias = file.boolean("attention_bias", False)
    theta = {
        True: file.number("local_rope_theta", 10_000.0),
        False: file.number("global_rope_theta", 160_000.0),
    }
    ropes = {
        is_local: read_rope(
            file,
            common["head_dim"],
            "sliding_attention" if is_local else "full_attention",
            default_theta=theta[is_local],
        )
        for is_local in (True, False)
    }
    return ModelConfig(
        architecture="ModernBertModel",
        names=_NAMES,
        prefix="model.",
        fused={"Wqkv": ("q_proj", "k_proj", "v_proj"), "Wi": ("gate_proj", "up_proj")},
        # The head of masked words.
        computed_weights=(
            *("head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias"),
            *("decoder.weight", "decoder.bias"),
        ),
        **common,
        norm_eps=file.number("norm_eps", 1e-5),
        norm_bias=file.boolean("norm_bias", False),
        embeddings_are_normed=True,
        max_position_embeddings=file.integer("max_position_embeddings"),
        activation=file.choice("hidden_activation", "gelu", ACTIVATIONS),
        rope=tuple(ropes[window > 0] for window in windows),
        sliding_windows=windows,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=file.boolean("mlp_bias", False),
    )


def modernbert_head(file: ConfigFile, config: ModelConfig) -> tuple[str, tuple[PoolerLayer, ...]]:
    """Pooling and layers of a classifier."""
    size = config.hidden_size
    dense = PoolerLayer(
        "head.dense",
        size,
        size,
        has_bias=file.boolean("classifier_bias", False),
        activation=file.choice("classifier_activation", "gelu", ACTIVATIONS),
        norm="head.norm",
    )
    return file.choice("classifier_pooling", "cls", ("cls", "mean")), (
        dense,
        PoolerLayer("classifier", size, num_labels(file), has_bias=True),
    )
