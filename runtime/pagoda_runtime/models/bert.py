"""BERT, RoBERTa and XLM-RoBERTa: encoders with learned positions and norms behind the sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda_runtime.config import SUPPORTED_DTYPES
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.models.config import DTYPE_OF_WEIGHTS, LearnedPositions, ModelConfig
from pagoda_runtime.models.llama import ACTIVATIONS
from pagoda_runtime.models.pooler_config import PoolerLayer, num_labels

_NAMES: Mapping[str, str] = {
    "embed_tokens": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "segment_embeddings": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "self_attn": "attention",
    "q_proj": "self.query",
    "k_proj": "self.key",
    "v_proj": "self.value",
    "o_proj": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp": "",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
NO_ROPE = RopeConfig(theta=10_000.0, partial_rotary_factor=0.0)


def encoder_fields(file: ConfigFile) -> dict[str, Any]:
    """The fields of ModelConfig that all encoders spell in the same way."""
    num_heads, hidden_size = file.integer("num_attention_heads"), file.integer("hidden_size")
    if hidden_size % num_heads:
        raise file.invalid("hidden_size", hidden_size, f"a multiple of {num_heads} heads")
    dtype_key = "dtype" if file.values.get("dtype") is not None else "torch_dtype"
    return {
        "vocab_size": file.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": file.integer("intermediate_size"),
        "num_layers": file.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "norm": "layer",
        "dtype": file.choice(dtype_key, DTYPE_OF_WEIGHTS, SUPPORTED_DTYPES),
        "tie_word_embeddings": True,
        "is_causal": False,
    }


def bert(file: ConfigFile) -> ModelConfig:
    """BertModel"""
    file.require_absent("is_decoder")
    file.choice("position_embedding_type", "absolute", ("absolute",))
    common, num_positions = encoder_fields(file), file.integer("max_position_embeddings")
    return ModelConfig(
        architecture="BertModel",
        names=_NAMES,
        prefix="bert.",
        # Pre-training's heads, and the pooler of whoever pools otherwise.
        computed_weights=(
            *("position_ids", "pooler.dense.weight", "pooler.dense.bias"),
            *("predictions.bias", "transform.dense.weight", "transform.dense.bias"),
            *("transform.LayerNorm.weight", "transform.LayerNorm.bias"),
            *("decoder.weight", "decoder.bias", "seq_relationship.weight", "seq_relationship.bias"),
        ),
        **common,
        norm_eps=file.number("layer_norm_eps", 1e-12),
        max_position_embeddings=num_positions,
        learned_positions=LearnedPositions(num_positions, 0, file.integer("type_vocab_size", 2)),
        activation=file.choice("hidden_act", "gelu", ACTIVATIONS),
        rope=(NO_ROPE,) * common["num_layers"],
        sliding_windows=(0,) * common["num_layers"],
        is_gated=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )


def roberta(file: ConfigFile) -> ModelConfig:
    """RobertaModel, XLMRobertaModel: positions begin behind that of the padding token."""
    config = bert(file)
    first = file.read_value("pad_token_id", 1, lambda v: isinstance(v, int) and v >= 0, "an id") + 1
    tables = config.learned_positions
    assert tables is not None
    return replace(
        config,
        architecture="XLMRobertaModel",
        prefix="roberta.",
        computed_weights=(
            *config.computed_weights,
            *("lm_head.bias", "lm_head.dense.weight", "lm_head.dense.bias"),
            *("lm_head.layer_norm.weight", "lm_head.layer_norm.bias", "lm_head.decoder.bias"),
        ),
        max_position_embeddings=config.max_position_embeddings - first,
        learned_positions=replace(tables, first=first),
    )


def bert_head(file: ConfigFile, config: ModelConfig) -> tuple[str, tuple[PoolerLayer, ...]]:
    """Pooling and layers of a classifier: BERT's pooler, and a layer upon it."""
    return _first_token_head(file, config.hidden_size, ("pooler.dense", "classifier"))


def roberta_head(file: ConfigFile, config: ModelConfig) -> tuple[str, tuple[PoolerLayer, ...]]:
    """The same by other names."""
    names = ("classifier.dense", "classifier.out_proj")
    return _first_token_head(file, config.hidden_size, names)


def _first_token_head(
    file: ConfigFile, size: int, names: tuple[str, str]
) -> tuple[str, tuple[PoolerLayer, ...]]:
    dense, last = names
    return "cls", (
        PoolerLayer(dense, size, size, has_bias=True, activation="tanh"),
        PoolerLayer(last, size, num_labels(file), has_bias=True),
    )
