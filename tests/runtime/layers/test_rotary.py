from __future__ import annotations

import json
import math

import pytest
import torch

from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.layers.rotary import inverse_frequencies
from pagoda_runtime.models.registry import load_model_config

HEAD_DIM = 16
DIVISORS = [1.0 + i / 4 for i in range(HEAD_DIM // 2)]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": DIVISORS,
    "long_factor": [4 * divisor for divisor in DIVISORS],
    "original_max_position_embeddings": 64,
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn with an attention factor": {**YARN, "attention_factor": 1.5},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with mscale alone": {**YARN, "mscale": 0.7},
    "yarn with betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn without a factor": {**YARN, "factor": None},
    "yarn of a narrow ramp": {**YARN, "beta_fast": 1.01, "beta_slow": 1, "truncate": False},
    "longrope": LONGROPE,
    "longrope with a factor": {**LONGROPE, "factor": 16.0},
    "longrope with an attention factor": {**LONGROPE, "attention_factor": 1.25},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def read_rope(folder, parameters):
    config = {**CONFIG, "rope_parameters": {"rope_theta": 5e3, **parameters}}
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_config(folder).rope[0]


@pytest.mark.parametrize("max_model_len", [64, 65, 256, 700])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_those_of_transformers(name, max_model_len, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(**CONFIG, rope_parameters={"rope_theta": 5e3, **ROPES[name]})
    rope = read_rope(tmp_path, ROPES[name])
    # transformers keeps the default type in the models' own code; linear by 1 is the same.
    if rope.rope_type == "default":
        theirs.rope_parameters = {"rope_type": "linear", "factor": 1.0, "rope_theta": 5e3}
    function = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    expected, attention_factor = function(theirs, torch.device("cpu"), seq_len=max_model_len)
    torch.testing.assert_close(inverse_frequencies(rope, HEAD_DIM, max_model_len), expected)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_llama3_rope_keeps_short_waves_divides_long_ones_and_blends_between():
    plain = inverse_frequencies(RopeConfig(1e4), 64, 8192)
    rope = RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 1024)
    ratio = inverse_frequencies(rope, 64, 8192) / plain
    wavelengths = 2 * math.pi / plain
    torch.testing.assert_close(ratio[wavelengths < 256], torch.ones(int((wavelengths < 256).sum())))
    long = ratio[wavelengths > 1024]
    torch.testing.assert_close(long, torch.full_like(long, 1 / 8))
    between = ratio[(wavelengths > 256) & (wavelengths < 1024)]
    assert len(between) > 0
    assert torch.all((between > 1 / 8) & (between < 1))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_within_the_original_context_a_length_dependent_rope_is_the_trained_one(name, tmp_path):
    rope = read_rope(tmp_path, ROPES[name])
    plain = inverse_frequencies(RopeConfig(5e3), HEAD_DIM, 64)
    if name == "longrope":
        plain /= torch.tensor(DIVISORS)
    assert torch.equal(inverse_frequencies(rope, HEAD_DIM, 64), plain)
    assert not torch.equal(inverse_frequencies(rope, HEAD_DIM, 257), plain)
