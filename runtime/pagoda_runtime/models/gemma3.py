"""Gemma 3 (text): sandwich norms, q and k norms, scaled embeddings, five local layers to one."""

from __future__ import annotations

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.config import common_fields as read_common_fields
from pagoda_runtime.models.llama import ACTIVATIONS, NAMES
from pagoda_runtime.models.qwen2 import windows_of_layer_types
from pagoda_runtime.models.rope import max_positions, read_rope

_NAMES = {
    **NAMES,
    # Here post_attention_layernorm is what its name says.
    "after_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "after_mlp_norm": "post_feedforward_layernorm",
}


def gemma3(file: ConfigFile) -> ModelConfig:
    """Gemma3ForCausalLM"""
    file.require_absent("attn_logit_softcapping", "final_logit_softcapping")
    is_causal = not file.boolean("use_bidirectional_attention", False)
    common = read_common_fields(file, default_head_dim=256)
    num_layers = common["num_layers"]
    window = file.integer("sliding_window", 4096)
    if not is_causal:
        # Of both sides together; a token itself is in neither.
        window = window // 2 + 1
    if file.values.get("layer_types") is not None:
        windows = windows_of_layer_types(file, num_layers, window)
    else:
        pattern = file.integer("sliding_window_pattern", 6)
        windows = tuple(window if (layer + 1) % pattern else 0 for layer in range(num_layers))
    global_rope = read_rope(file, common["head_dim"], default_theta=1_000_000.0)
    local_rope = _read_local_rope(file, common["head_dim"])
    common["max_position_embeddings"] = max_positions(file, global_rope)
    bias = file.boolean("attention_bias", False)
    return ModelConfig(
        architecture="Gemma3ForCausalLM",
        names=_NAMES,
        **common,
        activation=file.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        tie_word_embeddings=file.boolean("tie_word_embeddings", True),
        rope=tuple(local_rope if window else global_rope for window in windows),
        sliding_windows=windows,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        is_causal=is_causal,
        sandwich_norms=True,
        norm_weight_offset=1.0,
        embedding_scale=common["hidden_size"] ** 0.5,
        attention_scale=file.number("query_pre_attn_scalar", 256.0) ** -0.5,
    )


def _read_local_rope(file: ConfigFile, head_dim: int) -> RopeConfig:
    """Local layers have a rope of their own; older files name its theta rope_local_base_freq."""
    if "sliding_attention" in file.mapping("rope_parameters"):
        return read_rope(file, head_dim, "sliding_attention")
    return RopeConfig(file.number("rope_local_base_freq", 10_000.0))
