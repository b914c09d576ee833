from __future__ import annotations

import json

import pytest

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.quantization.config import read_quantization
from pagoda_runtime.quantization.schemes import (
    AWQ,
    EXL2,
    GGUF,
    GPTQ,
    PackedIntegers,
    ScaledNumbers,
)

LAYER = "model.layers.3.mlp.down_proj"
HEAD = "lm_head"
AWQ_FILE = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
GPTQ_FILE = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8_FILE = {"quant_method": "fp8", "activation_scheme": "dynamic"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
BY_ROW = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def compressed(weights=WEIGHTS, form="pack-quantized", inputs=None, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def read(folder, stored, flag=None, key="quantization_config"):
    path = folder / "config.json"
    path.write_text(json.dumps({key: stored} if stored else {}))
    return read_quantization(ConfigFile.read(path), flag)


def refusal(folder, stored, flag=None):
    with pytest.raises(FatalError) as caught:
        read(folder, stored, flag)
    assert caught.value.reason == "QuantizationMismatch"
    return caught.value.message


@pytest.mark.parametrize(
    ("file", "scheme"),
    [
        (AWQ_FILE, AWQ(128)),
        ({**AWQ_FILE, "version": "GEMM", "group_size": -1}, AWQ(-1)),
        (GPTQ_FILE, GPTQ(4, 128)),
        ({**GPTQ_FILE, "bits": 3, "group_size": -1, "desc_act": True}, GPTQ(3, -1, desc_act=True)),
        ({**GPTQ_FILE, "checkpoint_format": "gptq_v2"}, GPTQ(4, 128, is_v2=True)),
        (FP8_FILE, ScaledNumbers("e4m3", 0, "dynamic")),
        ({**FP8_FILE, "activation_scheme": "static"}, ScaledNumbers("e4m3", 0, "static")),
        ({**FP8_FILE, "weight_block_size": [128, 128]}, ScaledNumbers("e4m3", 128, "dynamic")),
        ({"quant_method": "exl2", "bits": 4.0, "head_bits": 6}, EXL2()),
        (compressed(), PackedIntegers(4, 32)),
        (compressed({**WEIGHTS, "symmetric": False}), PackedIntegers(4, 32, is_symmetric=False)),
        (compressed({**WEIGHTS, "num_bits": 8, "strategy": "channel"}), PackedIntegers(8, -1)),
        (compressed(INT8, "int-quantized", BY_ROW), ScaledNumbers("int8", 0, "dynamic")),
        (
            compressed(INT8, "int-quantized", {**BY_ROW, "dynamic": False}),
            ScaledNumbers("int8", 0, "static"),
        ),
        (
            compressed(INT8, "int-quantized", {**BY_ROW, "symmetric": False}),
            ScaledNumbers("int8", 0, "none"),
        ),
        (compressed(FP8, "float-quantized"), ScaledNumbers("e4m3", 0, "none")),
        (
            compressed(
                {**FP8, "strategy": "block", "block_structure": [128, 128]}, "float-quantized"
            ),
            ScaledNumbers("e4m3", 128, "none"),
        ),
    ],
)
def test_a_file_says_how_layers_are_stored(tmp_path, file, scheme):
    found = read(tmp_path, file)
    assert found.scheme_of(LAYER) == scheme
    assert found.method == file["quant_method"]
    assert found.scheme_of(HEAD) == (scheme if file["quant_method"] == "exl2" else None)
    # What the flag repeats goes with the file.
    assert read(tmp_path, file, flag=found.method) == found


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_were_not_converted_are_unquantized(tmp_path, key):
    found = read(tmp_path, {**FP8_FILE, key: ["model.layers.0", "self_attn", HEAD]})
    assert found.scheme_of("model.layers.0.mlp.up_proj") is None
    assert found.scheme_of("model.layers.5.self_attn.q_proj") is None
    assert found.scheme_of("model.layers.01.mlp.up_proj")
    assert found.scheme_of("model.layers.5.mlp.up_proj")


def test_modules_are_ignored_by_name_and_by_expression(tmp_path):
    ignore = ["re:.*layers\\.1\\..*", LAYER]
    found = read(tmp_path, compressed(ignore=ignore))
    assert found.scheme_of("model.layers.1.mlp.up_proj") is None
    assert found.scheme_of(LAYER) is None
    assert found.scheme_of("model.layers.11.mlp.up_proj")
    assert found.scheme_of(HEAD)


def test_groups_of_modules_have_numbers_of_their_own(tmp_path):
    file = compressed(form="mixed-precision")
    file["config_groups"] = {
        "group_0": {"targets": ["re:.*down_proj$"], "weights": FP8, "format": "float-quantized"},
        "group_1": {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"},
    }
    found = read(tmp_path, file)
    assert found.scheme_of(LAYER) == ScaledNumbers("e4m3", 0, "none")
    assert found.scheme_of("model.layers.3.mlp.up_proj") == PackedIntegers(4, 32)


def test_a_module_s_name_comes_before_an_expression_and_that_before_its_class(tmp_path):
    file = compressed(form="mixed-precision")
    weights = {bits: {**WEIGHTS, "group_size": bits} for bits in (32, 64, 128)}
    file["config_groups"] = {
        "a": {"targets": ["Linear"], "weights": weights[32], "format": "pack-quantized"},
        "b": {"targets": ["re:.*down_proj$"], "weights": weights[64], "format": "pack-quantized"},
        "c": {"targets": [LAYER], "weights": weights[128], "format": "pack-quantized"},
    }
    found = read(tmp_path, file)
    assert found.scheme_of(LAYER) == PackedIntegers(4, 128)
    assert found.scheme_of("model.layers.9.mlp.down_proj") == PackedIntegers(4, 64)
    assert found.scheme_of("model.layers.9.mlp.up_proj") == PackedIntegers(4, 32)


def test_gptq_overrides_modules_by_expression(tmp_path):
    dynamic = {
        "-:.*layers\\.0\\..*": {},
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        ".*o_proj": {"desc_act": True},
    }
    found = read(tmp_path, {**GPTQ_FILE, "dynamic": dynamic})
    assert found.scheme_of("model.layers.0.mlp.down_proj") is None
    assert found.scheme_of(LAYER) == GPTQ(8, 32)
    assert found.scheme_of("model.layers.3.self_attn.o_proj") == GPTQ(4, 128, desc_act=True)
    assert found.scheme_of("model.layers.3.self_attn.q_proj") == GPTQ(4, 128)


def test_gguf_names_the_type_of_each_matrix(tmp_path):
    types = {LAYER: "Q6_K", "model.layers.3.mlp.up_proj": "Q4_K", HEAD: "Q6_K"}
    found = read(tmp_path, {"quant_method": "gguf", "types": types})
    assert {name: found.scheme_of(name) for name in types} == {
        name: GGUF(kind) for name, kind in types.items()
    }
    assert found.scheme_of("model.layers.33.mlp.up_proj") is None
    assert found.scheme_of(f"a.{LAYER}") is None
    types[LAYER] = "Q3_K"
    message = refusal(tmp_path, {"quant_method": "gguf", "types": types})
    assert f"types.{LAYER} is 'Q3_K'; it must be one of Q4_0" in message


def test_gptq_may_name_the_modules_and_the_head(tmp_path):
    names = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    found = read(tmp_path, {**GPTQ_FILE, "modules_in_block_to_quantize": names})
    assert found.scheme_of(LAYER) == GPTQ(4, 128)
    assert found.scheme_of("model.layers.3.mlp.up_proj") is None
    assert read(tmp_path, {**GPTQ_FILE, "lm_head": True}).scheme_of(HEAD) == GPTQ(4, 128)


def test_gptqs_old_file_is_read(tmp_path):
    old = {"bits": 8, "group_size": 64, "desc_act": True, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    assert read(tmp_path, {}).scheme_of(LAYER) == GPTQ(8, 64, desc_act=True)
    assert read(tmp_path, {}, flag="gptq").method == "gptq"
    assert "quantize_config.json" in refusal(tmp_path, {}, flag="awq")


def test_compressed_tensors_old_key_is_read(tmp_path):
    found = read(tmp_path, compressed(), key="compression_config")
    assert found.scheme_of(LAYER) == PackedIntegers(4, 32)


@pytest.mark.parametrize(("kind", "dtype"), [("float", "fp8_e4m3"), ("int", "int8"), (None, None)])
def test_what_keys_and_values_were_quantized_to_is_known(tmp_path, kind, dtype):
    scheme = kind and {"num_bits": 8, "type": kind, "strategy": "tensor"}
    assert read(tmp_path, compressed(kv_cache_scheme=scheme)).kv_cache_dtype == dtype


@pytest.mark.parametrize("flag", ["none", "gptq", "int4", "fp8"])
def test_a_flag_against_the_file_is_refused_by_both_values(tmp_path, flag):
    message = refusal(tmp_path, AWQ_FILE, flag)
    assert f"--quantization {flag}" in message
    assert "quantized by awq" in message
    assert "Remove the flag, or set it to awq" in message


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ({"quant_method": "quip"}, "quant_method is 'quip'; it must be one of awq, gptq, fp8"),
        ({"bits": 4}, "quant_method is None"),
        ({**AWQ_FILE, "bits": 8}, "bits is 8; it must be one of 4"),
        ({**AWQ_FILE, "version": "gemv"}, "version is 'gemv'; it must be gemm"),
        ({**AWQ_FILE, "group_size": 0}, "group_size is 0"),
        ({**AWQ_FILE, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({**GPTQ_FILE, "bits": 5}, "bits is 5; it must be one of 2, 3, 4, 8"),
        ({**GPTQ_FILE, "bits": True}, "bits is True"),
        ({**GPTQ_FILE, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ_FILE, "pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({**GPTQ_FILE, "desc_act": "yes"}, "desc_act is 'yes'"),
        ({**GPTQ_FILE, "dynamic": {"+:(": {}}}, "must be a regular expression"),
        ({**GPTQ_FILE, "dynamic": {"+:.*": {"bits": 9}}}, "dynamic.+:.*.bits is 9"),
        ({**GPTQ_FILE, "modules_in_block_to_quantize": ["a"]}, "a list of lists of names"),
        ({**FP8_FILE, "weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
        ({**FP8_FILE, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**FP8_FILE, "activation_scheme": "token"}, "activation_scheme is 'token'"),
        (compressed(form="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (compressed({**WEIGHTS, "num_bits": 3}), "config_groups.group_0.weights.num_bits is 3"),
        (compressed({**WEIGHTS, "group_size": None}), "weights.group_size is None"),
        (compressed({**INT8, "strategy": "group"}, "int-quantized"), "strategy is 'group'"),
        (compressed({**INT8, "symmetric": False}, "int-quantized"), "symmetric is False"),
        (compressed(inputs=BY_ROW), "input_activations is"),
        (compressed(ignore=["re:("]), "must be a regular expression"),
        (compressed(transform_config={"a": 1}), "transform_config is {'a': 1}"),
        (compressed(sparsity_config={"format": "24"}), "sparsity_config is"),
        (compressed(kv_cache_scheme={"num_bits": 4, "type": "float"}), "num_bits is 4"),
        (compressed(config_groups={}), "config_groups is {}"),
    ],
)
def test_what_cannot_be_served_is_refused_by_key_and_value(tmp_path, file, shown):
    message = refusal(tmp_path, file)
    assert "config.json: quantization_config." in message
    assert shown in message
