from __future__ import annotations

import json

import pytest
import torch

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.registry import load_model_config, make_model
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "torch_dtype": "float16",
    "eos_token_id": 7,
}
GEMMA = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "head_dim": 32,
    "sliding_window": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def load(folder, config, generation=None, **flags):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder, **flags)


def refusal(folder, config, **flags):
    with pytest.raises(FatalError) as caught:
        load(folder, config, **flags)
    assert "config.json" in caught.value.message
    return caught.value


def test_old_and_new_spelling_of_rope_mean_the_same(tmp_path):
    old = load(tmp_path, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4}})
    parameters = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert old.rope == load(tmp_path, {**new, "rope_parameters": parameters}).rope
    assert old.rope[0].factor == 4.0


def test_gemma_has_two_ropes_in_both_spellings(tmp_path):
    old = load(
        tmp_path,
        {
            **GEMMA,
            "rope_theta": 1e6,
            "rope_local_base_freq": 2e4,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    )
    nested = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    new = load(tmp_path, {**GEMMA, "rope_parameters": nested, "layer_types": layer_types})
    assert old.rope == new.rope
    assert old.sliding_windows == new.sliding_windows == (16, 16, 0, 16, 16, 0)
    assert [rope.theta for rope in new.rope] == [2e4, 2e4, 1e6, 2e4, 2e4, 1e6]


def test_llama3_rope_takes_its_original_length_from_the_model_if_it_names_none(tmp_path):
    config = load(tmp_path, {**LLAMA, "rope_scaling": LLAMA3})
    assert config.rope[0].original_max_position_embeddings == 512


def test_a_rope_that_extends_the_context_says_how_far_the_model_reaches(tmp_path):
    dynamic = load(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}})
    assert dynamic.max_position_embeddings == 1536
    assert dynamic.rope[0].original_max_position_embeddings == 512
    # Some files with yarn name the original positions, some those that it reaches.
    for positions in (256, 1024):
        file = {**LLAMA, "max_position_embeddings": positions, "rope_scaling": YARN}
        assert load(tmp_path, file).max_position_embeddings == 1024


def test_longrope_reads_the_original_positions_where_phi_3_names_them(tmp_path):
    file = {**LLAMA, "original_max_position_embeddings": 128, "rope_scaling": LONGROPE}
    rope = load(tmp_path, file).rope[0]
    assert (rope.original_max_position_embeddings, rope.factor) == (128, 4.0)
    assert load(tmp_path, file).max_position_embeddings == 512


def test_end_tokens_and_sampling_come_from_generation_config(tmp_path):
    generation = {"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.6, "top_k": 20}
    config = load(tmp_path, LLAMA, generation)
    assert config.eos_token_ids == (3, 4)
    assert config.default_sampling == {"temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path, LLAMA).eos_token_ids == (7,)


def test_a_missing_folder_or_file_is_not_found(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(FatalError, match="does not exist") as caught:
            load_model_config(folder)
        assert caught.value.reason == "ModelNotFound"


def test_a_directory_in_the_place_of_a_file_is_access_denied(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FatalError, match="cannot be read") as caught:
        load_model_config(tmp_path)
    assert caught.value.reason == "ModelAccessDenied"


@pytest.mark.parametrize("text", ["{", "[]", '"model"'])
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FatalError, match=r"config\.json") as caught:
        load_model_config(tmp_path)
    assert caught.value.reason == "InvalidModelConfig"


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    error = refusal(tmp_path, {**LLAMA, "architectures": ["MambaForCausalLM"]})
    assert error.reason == "UnsupportedArchitecture"
    assert "MambaForCausalLM" in error.message
    assert "Qwen3ForCausalLM" in error.message


def test_an_unknown_rope_type_is_refused_with_the_known_ones(tmp_path):
    error = refusal(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": "xpos", "factor": 2.0}})
    assert error.reason == "InvalidModelConfig"
    assert "'xpos'" in error.message
    assert "default, linear, dynamic, llama3, yarn, longrope" in error.message


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"hidden_size": 62}, "hidden_size is 62"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"architectures": []}, "architectures is []"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor is 4.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {**YARN, "beta_fast": 1}}, "rope_scaling.beta_fast is 1.0"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_scaling": {**YARN, "mscale": "x", "mscale_all_dim": 1}}, "mscale is 'x'"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1}}, "embeddings is 1"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta is 1.0"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor is [1.0]"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [0] * 8}}, "short_factor is [0, 0"),
        ({"rope_scaling": {**LONGROPE, "short_factor": 2}}, "short_factor is 2"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_a_wrong_value_is_refused_by_key_and_value(tmp_path, change, shown):
    error = refusal(tmp_path, {**LLAMA, **change})
    assert error.reason == "InvalidModelConfig"
    assert shown in error.message


def test_soft_capping_is_refused_rather_than_ignored(tmp_path):
    assert (
        "final_logit_softcapping"
        in refusal(tmp_path, {**GEMMA, "final_logit_softcapping": 30.0}).message
    )


def test_the_quantization_is_what_file_and_flag_say(tmp_path):
    file = {"quant_method": "awq", "bits": 4, "group_size": 64}
    stored = load(tmp_path, {**LLAMA, "quantization_config": file})
    assert stored.quantization.method == "awq"
    assert load(tmp_path, LLAMA, quantization="int8").quantization.method == "int8"
    assert load(tmp_path, LLAMA).quantization is None
    assert load(tmp_path, LLAMA, quantization="none").quantization is None


def test_a_quantization_that_nothing_can_become_is_refused(tmp_path):
    error = refusal(tmp_path, LLAMA, quantization="awq")
    assert error.reason == "QuantizationMismatch"
    assert "--quantization awq" in error.message
    assert "fp8, int8, int4" in error.message


def make_tiny_model(folder, family):
    config = load_model_config(make_tiny_checkpoint(folder / family, family))
    placement = Placement(torch.float32, torch.device("cpu"), UnquantizedLinear)
    return config, make_model(config, placement)


def test_the_depth_at_which_a_token_takes_twice_the_work_counts_only_layers_that_see_all(tmp_path):
    config, model = make_tiny_model(tmp_path, "llama")
    per_layer = sum(
        size
        for size in (
            config.hidden_size * config.num_heads * config.head_dim * 2,
            config.hidden_size * config.num_kv_heads * config.head_dim * 2,
            config.hidden_size * config.intermediate_size * 3,
        )
    )
    per_earlier_token = 2 * config.num_heads * config.head_dim
    assert model.doubling_depth == per_layer // per_earlier_token
    _, gemma = make_tiny_model(tmp_path, "gemma3_text")
    assert gemma.doubling_depth > model.doubling_depth
