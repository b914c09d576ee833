"""Whole checkpoints, quantized here number by number, and the same weights in fp32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.testing import (
    write_awq,
    write_exl2,
    write_gguf,
    write_gptq,
    write_packed,
    write_scaled,
)

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


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The folders of a quantized checkpoint and of the same weights in fp32."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
            quantize(*made[kind], *KINDS[kind])
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def kind(request):
    """Each format in turn."""
    return request.param


@pytest.fixture
def rewritten(pair, tmp_path):
    """A copy of a quantized checkpoint, with its tensors or its config.json changed."""

    def make(kind, *, tensors=lambda tensors: None, config=lambda values: None):
        quantized, _ = pair(kind)
        make_tiny_checkpoint(tmp_path)
        values = json.loads((quantized / "config.json").read_text())
        stored = load_file(quantized / "model.safetensors")
        tensors(stored)
        config(values)
        rewrite(tmp_path, stored, **values)
        return tmp_path

    return make


@pytest.fixture
def make_runner():
    def make(folder, parallel=None, **flags):
        values = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 1 << 22} | flags
        config = EngineConfig(model=str(folder), **values)
        return ModelRunner(config, no_progress, parallel or TensorParallel())

    return make
