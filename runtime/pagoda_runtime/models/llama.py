"""Llama: the plain decoder. Other families are told by their difference from it."""

from __future__ import annotations

from collections.abc import Mapping

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.models.config import ModelConfig, common_fields
from pagoda_runtime.models.rope import max_positions, read_rope

NAMES: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


def llama(file: ConfigFile, default_head_dim: int | None = None) -> ModelConfig:
    """LlamaForCausalLM"""
    common = common_fields(file, default_head_dim)
    rope = read_rope(file, common["head_dim"])
    common["max_position_embeddings"] = max_positions(file, rope)
    bias = file.boolean("attention_bias", False)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        names=NAMES,
        computed_weights=("rotary_emb.inv_freq",),
        **common,
        activation=file.choice("hidden_act", "silu", ACTIVATIONS),
        tie_word_embeddings=file.boolean("tie_word_embeddings", False),
        rope=(rope,) * common["num_layers"],
        sliding_windows=(0,) * common["num_layers"],
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=file.boolean("mlp_bias", False),
    )
