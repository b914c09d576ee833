"""Whole checkpoints, quantized here number by number, against the same weights in fp32."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda_kernels.cpu import panels
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.parallel import TensorParallel, connect
from pagoda_runtime.quantization.testing import (
    write_awq,
    write_exl2,
    write_gguf,
    write_gptq,
    write_packed,
    write_scaled,
)

PROMPTS = [[5, 9, 100, 7, 42], list(range(40, 70))]
HEAD = "lm_head"
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [HEAD]}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
BY_ROW = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}


def group(weights, inputs=None, targets=("Linear",)):
    return {"targets": [*targets], "weights": weights, "input_activations": inputs}


def scattered(inputs):
    return (torch.arange(inputs) // 32)[torch.randperm(inputs)]


def awq(name, outputs, inputs):
    return None if name == HEAD or ".0.self_attn." in name else write_awq(outputs, inputs, 32)


def gptq(name, outputs, inputs):
    """An order of its own for each matrix, and a bias of zeros as some tools write it."""
    if "layers.1" in name:
        return None
    bits = 8 if "up_proj" in name else 4
    written = write_gptq(outputs, inputs, 32, bits, groups=scattered(inputs))
    written.tensors["bias"] = torch.zeros(outputs)
    return written


def packed(name, outputs, inputs):
    return None if name == HEAD else write_packed(outputs, inputs, 32)


def blocks(name, outputs, inputs):
    kinds = {"scales_of": "block", "scale_name": "weight_scale_inv"}
    return None if name == HEAD else write_scaled(outputs, inputs, **kinds)


def int8(name, outputs, inputs):
    kinds = {"numbers": "int8", "scales_of": "channel"}
    return None if name == HEAD else write_scaled(outputs, inputs, **kinds)


def static(name, outputs, inputs):
    if name == HEAD:
        return None
    written = write_scaled(outputs, inputs)
    written.tensors["input_scale"] = torch.tensor(0.25)
    return written


def mixed(name, outputs, inputs):
    """Another format for k than for q and v."""
    if name == HEAD:
        return None
    is_fp8 = "k_proj" in name or "up_proj" in name
    return write_scaled(outputs, inputs) if is_fp8 else write_packed(outputs, inputs, 32)


def exl2(name, outputs, inputs):
    return write_exl2(outputs, inputs, [(5, 32), (4, inputs - 32)])


# Of k another than of q and v; ranks cut through the blocks of down_proj.
GGUF_BLOCKS = {"k_proj": "Q5_1", "down_proj": "Q4_1", HEAD: "Q8_0"}


def gguf_type(name):
    return GGUF_BLOCKS.get(name.rpartition(".")[2], "Q5_0" if "self_attn" in name else "Q4_0")


def gguf(name, outputs, inputs):
    return write_gguf(outputs, inputs, gguf_type(name))


GGUF_MODULES = [
    HEAD,
    *(
        f"model.layers.{layer}.{name}_proj"
        for layer in range(2)
        for name in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    ),
]

# Format → its quantization_config, and what writes a matrix by name; None: it stays.
KINDS = {
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "modules_to_not_convert": ["model.layers.0.self_attn"],
        },
        awq,
    ),
    "gptq": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "desc_act": True,
            "lm_head": True,
            "dynamic": {"-:.*layers\\.1\\.": {}, "+:.*up_proj": {"bits": 8}},
        },
        gptq,
    ),
    "packed": ({**COMPRESSED, "config_groups": {"a": group(WEIGHTS)}}, packed),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, blocks),
    "fp8, static": ({"quant_method": "fp8", "activation_scheme": "static"}, static),
    "int8": (
        {**COMPRESSED, "format": "int-quantized", "config_groups": {"a": group(INT8, BY_ROW)}},
        int8,
    ),
    "mixed": (
        {
            **COMPRESSED,
            "format": "mixed-precision",
            "config_groups": {
                "a": group(FP8, targets=["re:.*(k|up)_proj$"]) | {"format": "float-quantized"},
                "b": group(WEIGHTS) | {"format": "pack-quantized"},
            },
        },
        mixed,
    ),
    "exl2": ({"quant_method": "exl2", "bits": 4.5}, exl2),
    "gguf": (
        {"quant_method": "gguf", "types": {name: gguf_type(name) for name in GGUF_MODULES}},
        gguf,
    ),
}


def rewrite(folder, tensors, **settings):
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **settings}))


def quantize(folder, oracle, stored, write):
    """Write a quantized checkpoint, and one in fp32 whose weights are the same."""
    for each in (folder, oracle):
        make_tiny_checkpoint(each, num_hidden_layers=2)
    torch.manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in list(tensors):
        module = name.removesuffix(".weight")
        is_matrix = "proj" in name or module == HEAD
        if is_matrix and (written := write(module, *tensors[name].shape)):
            del tensors[name]
            tensors |= {f"{module}.{key}": tensor for key, tensor in written.tensors.items()}
            plain[name] = written.weight.float()
    rewrite(folder, tensors, quantization_config=stored)
    rewrite(oracle, plain)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders of a quantized checkpoint and of the same weights in fp32."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
            quantize(*made[kind], *KINDS[kind])
        return made[kind]

    return make


def make_runner(folder, parallel=None, **flags):
    values = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 1 << 22} | flags
    config = EngineConfig(model=str(folder), **values)
    return ModelRunner(config, no_progress, parallel or TensorParallel())


def logits_of(runner):
    """Of every prompt's last token and of those that follow."""
    find, seen = runner.model.logits, []

    def note(hidden):
        seen.append(find(hidden).clone())
        return seen[-1]

    runner.model.logits = note
    tokens = generate(runner, PROMPTS, 4)
    return tokens, torch.cat(seen)


def assert_alike(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_same_weights_in_fp32(pair, kind):
    quantized, oracle = pair(kind)
    expected = logits_of(make_runner(oracle))
    assert expected[0] == transformers_tokens(oracle, PROMPTS, 4)
    assert_alike(logits_of(make_runner(quantized)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_logits_of_one(pair, kind, tmp_path):
    quantized, oracle = pair(kind)

    def run(rank):
        parallel = connect(rank, 2, str(tmp_path), torch.device("cpu"), backend="gloo")
        return logits_of(make_runner(quantized, parallel, tensor_parallel_size=2))

    expected = logits_of(make_runner(oracle))
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(run, range(2)):
            assert_alike(found, expected)


def test_what_runs_is_reported_and_what_a_step_reads_is_logged(pair, caplog):
    with caplog.at_level(logging.INFO):
        facts = make_runner(pair("awq")[0], kv_cache_dtype="fp8").ready_facts
    assert (facts.architecture, facts.quantization) == ("LlamaForCausalLM", "awq")
    assert facts.kv_cache_dtype == "fp8_e4m3"
    assert "Quantized by awq: a step reads" in caplog.text


def test_a_quantized_vocabulary_is_used_though_the_config_says_that_it_is_tied(pair, tmp_path):
    quantized, oracle = pair("exl2")
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text())
    stored = values["quantization_config"]
    rewrite(
        tmp_path,
        load_file(quantized / "model.safetensors"),
        quantization_config=stored,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )
    assert_alike(logits_of(make_runner(tmp_path)), logits_of(make_runner(oracle)))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


LAYER = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("kind", "edit", "shown"),
    [
        ("awq", drop(f"{LAYER}.scales"), f"1 missing: {LAYER}.scales"),
        (
            "awq",
            put(f"{LAYER}.qweight", lambda t: t[:, :4]),
            "qweight ([96, 4] instead of [96, 8])",
        ),
        ("awq", put(f"{LAYER}.qweight", lambda t: t[:90]), "qweight ([90, 8] instead of [96, 8])"),
        ("awq", put(f"{LAYER}.qzeros", lambda t: t.long()), "qzeros (int64 instead of int32)"),
        ("gptq", put(f"{LAYER}.g_idx", lambda t: t + 1), "g_idx: it names the groups 1 to 3"),
        ("gptq", drop(f"{LAYER}.g_idx"), f"1 missing: {LAYER}.g_idx"),
        ("gptq", put(f"{LAYER}.scales", lambda t: t[:2]), "scales ([2, 64] instead of [3, 64])"),
        (
            "packed",
            put(f"{LAYER}.weight_shape", lambda t: t.flip(0)),
            "weight_shape: [96, 64]; it must be [64, 96] as in config.json",
        ),
        (
            "packed",
            put(f"{LAYER}.weight_packed", lambda t: t[:, :6]),
            "[64, 6] instead of [64, 12]",
        ),
        (
            "awq",
            put(f"{LAYER}.scales", lambda t: t / 0),
            f"{LAYER}.scales: a scale is infinite, or no number",
        ),
        (
            "gguf",
            put(f"{LAYER}.qweight", lambda t: t | 0x7C),
            f"{LAYER}.qweight: a scale is infinite, or no number",
        ),
        (
            "int8",
            put(f"{LAYER}.weight_scale", lambda t: t[:7]),
            "weight_scale: its shape is [7, 1]; it must be one number, or one for each of 64",
        ),
        (
            "gguf",
            put(f"{LAYER}.qweight", lambda t: t[:, :54]),
            "qweight ([64, 54] instead of [64, 60])",
        ),
        ("int8", put(f"{LAYER}.weight", lambda t: t.float()), "weight (float32 instead of int8)"),
        ("fp8, static", drop(f"{LAYER}.input_scale"), f"missing: {LAYER}.input_scale"),
        (
            "fp8, static",
            put(f"{LAYER}.input_scale", torch.neg),
            f"{LAYER}.input_scale: it is -0.25; it must be one positive number",
        ),
        ("fp8 in blocks", drop(f"{LAYER}.weight_scale_inv"), f"missing: {LAYER}.weight_scale"),
        (
            "exl2",
            put(f"{ATTENTION}.q_groups", lambda t: torch.tensor([5, 0, 7, 5], dtype=torch.int16)),
            f"{ATTENTION}.q_groups: group 1 has 7 bits",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_weight", lambda t: t[:-2]),
            f"{ATTENTION}.q_groups: it is of 48 inputs; it must be of the matrix's 64",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_invperm", lambda t: t * 0),
            f"{ATTENTION}.q_invperm: it has some places twice",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_scale_max", lambda t: t[:1]),
            f"{ATTENTION}.q_scale_max: it has 1 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_tensor_and_both_values(pair, tmp_path, kind, edit, shown):
    quantized, _ = pair(kind)
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text())
    tensors = load_file(quantized / "model.safetensors")
    edit(tensors)
    rewrite(tmp_path, tensors, **values)
    with pytest.raises(FatalError) as caught:
        make_runner(tmp_path)
    assert caught.value.reason == "CorruptWeights"
    assert shown in caught.value.message
    assert "Download the model again" in caught.value.message


def test_groups_that_are_in_an_order_have_one(pair, tmp_path):
    quantized, _ = pair("packed")
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text())
    scheme = values["quantization_config"]["config_groups"]
    for part in scheme.values():
        part["weights"]["actorder"] = "group"
    rewrite(tmp_path, load_file(quantized / "model.safetensors"), **values)
    with pytest.raises(FatalError, match=r"missing: .*weight_g_idx"):
        make_runner(tmp_path)


@pytest.mark.skipif(
    not panels.has_panels(panels.INT8), reason="this processor widens matrices in any dtype"
)
@pytest.mark.parametrize(("flag", "expected"), [("auto", "bfloat16"), ("float16", "float16")])
def test_what_says_float16_computes_in_what_a_cpu_has_products_for(
    pair, tmp_path, caplog, flag, expected
):
    quantized, _ = pair("awq")
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text()) | {"dtype": "float16"}
    values.pop("torch_dtype", None)
    rewrite(tmp_path, load_file(quantized / "model.safetensors"), **values)
    with caplog.at_level(logging.INFO):
        assert make_runner(tmp_path, dtype=flag).ready_facts.dtype == expected
    assert ("instead of float16" in caplog.text) == (flag == "auto")


def test_groups_that_do_not_divide_the_inputs_are_refused(pair, tmp_path):
    quantized, _ = pair("awq")
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text())
    values["quantization_config"]["group_size"] = 40
    rewrite(tmp_path, load_file(quantized / "model.safetensors"), **values)
    with pytest.raises(FatalError) as caught:
        make_runner(tmp_path)
    assert caught.value.reason == "QuantizationMismatch"
    assert "model.layers.0.mlp.gate_proj: its 64 inputs are no multiple" in caught.value.message


@pytest.mark.parametrize(("flag", "is_refused"), [("int8", True), ("fp8", False), ("auto", False)])
def test_a_cache_against_what_the_checkpoint_was_made_for_is_refused(
    pair, tmp_path, flag, is_refused
):
    quantized, _ = pair("packed")
    make_tiny_checkpoint(tmp_path)
    values = json.loads((quantized / "config.json").read_text())
    values["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    rewrite(tmp_path, load_file(quantized / "model.safetensors"), **values)
    if not is_refused:
        assert make_runner(tmp_path, kv_cache_dtype=flag).num_blocks
        return
    with pytest.raises(FatalError, match=r"--kv-cache-dtype .* is int8, .* fp8_e4m3") as caught:
        make_runner(tmp_path, kv_cache_dtype=flag)
    assert caught.value.reason == "QuantizationMismatch"
