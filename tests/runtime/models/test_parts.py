"""Families that the decoder's parts are enough for, and that are not served yet."""

from __future__ import annotations

import pytest

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models import registry
from pagoda_runtime.models.config import ModelConfig, common_fields
from pagoda_runtime.models.llama import ACTIVATIONS, NAMES
from pagoda_runtime.models.rope import read_rope
from pagoda_runtime.models.testing import make_tiny_checkpoint

PROMPTS = [[5, 9, 100, 7, 42], [11], list(range(40, 80))]


def stablelm(file: ConfigFile) -> ModelConfig:
    """LayerNorm, and a quarter of each head rotated."""
    common = {**common_fields(file), "norm_eps": file.number("layer_norm_eps", 1e-5)}
    rope = read_rope(file, common["head_dim"], is_partial=True)
    return ModelConfig(
        architecture="StableLmForCausalLM",
        names=NAMES,
        **common,
        activation=file.choice("hidden_act", "silu", ACTIVATIONS),
        tie_word_embeddings=file.boolean("tie_word_embeddings", False),
        rope=(rope,) * common["num_layers"],
        sliding_windows=(0,) * common["num_layers"],
        norm="layer",
        qkv_bias=file.boolean("use_qkv_bias", False),
    )


def starcoder2(file: ConfigFile) -> ModelConfig:
    """LayerNorm, biases, and feed-forward layers without a gate whose matrices have other names."""
    common = {**common_fields(file), "norm_eps": file.number("norm_epsilon", 1e-5)}
    bias = file.boolean("use_bias", True)
    return ModelConfig(
        architecture="Starcoder2ForCausalLM",
        names={**NAMES, "up_proj": "c_fc", "down_proj": "c_proj"},
        **common,
        activation=file.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        tie_word_embeddings=file.boolean("tie_word_embeddings", True),
        rope=(read_rope(file, common["head_dim"]),) * common["num_layers"],
        sliding_windows=(0,) * common["num_layers"],
        norm="layer",
        is_gated=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )


SETTINGS = {
    "stablelm": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 0.25,
        },
        "use_qkv_bias": True,
    },
    "starcoder2": {},
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    families = {"StableLmForCausalLM": stablelm, "Starcoder2ForCausalLM": starcoder2}
    monkeypatch.setattr(registry, "ARCHITECTURES", {**registry.ARCHITECTURES, **families})


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family_made_of_other_parts_gives_the_tokens_of_transformers(family, dtype, tmp_path):
    make_tiny_checkpoint(tmp_path, family, **SETTINGS[family])
    config = EngineConfig(
        model=str(tmp_path), dtype=dtype, num_threads=1, kv_cache_memory_bytes=1 << 22
    )
    tokens = generate(ModelRunner(config), PROMPTS, 8)
    expected = transformers_tokens(tmp_path, PROMPTS, 8)
    if dtype == "float32":
        assert tokens == expected
    else:
        assert sum(a[0] == b[0] for a, b in zip(tokens, expected, strict=True)) >= 2


def test_a_share_of_a_head_that_is_no_share_is_refused(tmp_path):
    for factor in (0, 1.5, "half"):
        rope = {**SETTINGS["stablelm"]["rope_parameters"], "partial_rotary_factor": factor}
        file = ConfigFile(tmp_path / "config.json", {"rope_parameters": rope})
        with pytest.raises(FatalError, match=r"partial_rotary_factor is .* at most 1"):
            read_rope(file, 16, is_partial=True)
