"""What the operator says of a model is what the engine makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from pagoda_kernels.kv_cache import token_bytes
from pagoda_operator.checkpoint import (
    DTYPE_BYTES,
    GENERATORS,
    METHODS,
    POOLED,
    Checkpoint,
    CheckpointError,
    Tensors,
    read_checkpoint,
)
from pagoda_operator.decode import camel_case
from pagoda_operator.flags import flag_value
from pagoda_operator.gpus import GpuMemory
from pagoda_operator.preflight import TENSOR_PARALLEL_SIZES, check, divides
from pagoda_operator.sizing import (
    BLOCK_SIZE,
    BYTES_OF_ROUNDED,
    LARGEST_GRAPH,
    MAX_NUM_BATCHED_TOKENS,
    block_bytes,
    overhead_bytes,
    size_engine,
    weight_bytes,
)
from pagoda_operator.spec import Engine
from pagoda_operator.testing import make_service
from pagoda_operator.tools import LIMITS
from pagoda_runtime.config import KV_CACHE_DTYPES, SUPPORTED_DTYPES
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution import decode_steps
from pagoda_runtime.execution.memory import size_kv_cache
from pagoda_runtime.models.check import verify_kv_cache_dtype, verify_tensor_parallel
from pagoda_runtime.models.registry import (
    ARCHITECTURES,
    CLASSIFIERS,
    EMBEDDERS,
    load_model_config,
    make_model,
)
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.platforms import MemoryBudget
from pagoda_runtime.platforms.cuda import CudaPlatform
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.config import ONLINE, READERS
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "vocab_size": 322,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8"}
CALIBRATED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "one": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float"},
            "format": "float-quantized",
        }
    },
    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}


def read(**config: Any) -> Checkpoint:
    return read_checkpoint({"architectures": [GENERATORS[0]], **TINY, **config}, Tensors())


def test_both_know_the_same_architectures_methods_and_dtypes() -> None:
    assert set(GENERATORS) == set(ARCHITECTURES)
    assert {*EMBEDDERS, *CLASSIFIERS} == POOLED
    assert set(METHODS) == set(READERS)
    assert set(BYTES_OF_ROUNDED) == set(ONLINE)
    assert set(DTYPE_BYTES) == set(SUPPORTED_DTYPES)


def test_the_engines_defaults_on_a_gpu_are_the_same() -> None:
    assert CudaPlatform.defaults["block_size"] == BLOCK_SIZE
    assert CudaPlatform.defaults["max_num_batched_tokens"] == MAX_NUM_BATCHED_TOKENS
    assert decode_steps._LARGEST_GRAPH == LARGEST_GRAPH


FILES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "heads of another size": {"head_dim": 32},
    "defaults": {"tie_word_embeddings": None, "num_key_value_heads": None},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn without a factor": {
        "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 128}
    },
}


@pytest.mark.parametrize("architecture", GENERATORS)
@pytest.mark.parametrize("file", FILES)
def test_both_read_the_same_of_a_file(architecture: str, file: str) -> None:
    values = {"architectures": [architecture], **TINY, **FILES[file]}
    theirs = ARCHITECTURES[architecture](ConfigFile(Path("config.json"), values))
    ours = read_checkpoint(values, Tensors())
    same = (
        *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers"),
        *("num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"),
        *("tie_word_embeddings", "dtype"),
    )
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("architecture", GENERATORS)
def test_matrices_take_the_bytes_that_the_operator_says(architecture: str, size: int) -> None:
    values = {"architectures": [architecture], **TINY}
    config = ARCHITECTURES[architecture](ConfigFile(Path("config.json"), values))
    placement = Placement(
        torch.bfloat16, torch.device("cpu"), UnquantizedLinear, TensorParallel(0, size)
    )
    parameters = [p for m in make_model(config, placement).modules() for p in m.parameters.values()]
    expected = sum(p.num_bytes for p in parameters if p.data.dim() == 2)
    checkpoint = read_checkpoint(values, Tensors())
    assert weight_bytes(checkpoint, Engine(tensor_parallel_size=size)) == expected


@pytest.mark.parametrize("kv_dtype", ["Auto", "FP8", "FP8E4M3", "FP8E5M2", "INT8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_block_takes_the_bytes_that_the_operator_says(kv_dtype: Any, size: int) -> None:
    name = KV_CACHE_DTYPES.get(flag_value(kv_dtype), "bfloat16")
    of_token = token_bytes(max(1, 2 // size), 16, getattr(torch, name))
    engine = Engine(kv_cache_dtype=kv_dtype, tensor_parallel_size=size)
    assert block_bytes(read(), engine) == 3 * BLOCK_SIZE * of_token


def test_larger_steps_take_more_memory() -> None:
    few, default, many = (
        overhead_bytes(read(), Engine(max_num_batched_tokens=tokens))
        for tokens in (512, None, 8192)
    )
    assert few < default < many


@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize("asked", [None, 17, 400, 512])
def test_the_cache_holds_what_the_engine_would_hold_in_the_same_bytes(
    asked: int | None, block_size: int | None
) -> None:
    checkpoint = read()
    engine = Engine(max_model_len=asked, max_num_seqs=2, block_size=block_size)
    total = size_engine(checkpoint, engine, GpuMemory("gpu", 0))
    assert total is not None
    for num_blocks in (1, 2, 3, 20, 26, 33, 40, 80):
        needed = total.weight_bytes + total.overhead_bytes + num_blocks * total.block_bytes
        gpu = GpuMemory("gpu", -(-needed * 10 // 9))
        fit = size_engine(checkpoint, engine, gpu)
        assert fit is not None
        config: Any = SimpleNamespace(max_position_embeddings=512)
        arguments: Any = {
            "block_size": block_size or BLOCK_SIZE,
            "block_bytes": fit.block_bytes,
            "max_num_seqs": 2,
            "max_model_len": asked,
        }
        budget = MemoryBudget(fit.cache_bytes, "flag")
        if fit.missing_bytes > 0:
            with pytest.raises(FatalError, match="KV cache"):
                size_kv_cache(config, budget, **arguments)
            continue
        size = size_kv_cache(config, budget, **arguments)
        assert fit.num_tokens == size.num_blocks * (block_size or BLOCK_SIZE)
        assert fit.max_model_len == size.max_model_len


@pytest.mark.parametrize("counts", [(32, 8, 14336), (28, 4, 18944), (4, 1, 2048), (12, 12, 3072)])
def test_ranks_divide_a_model_for_both_or_for_none(counts: tuple[int, int, int]) -> None:
    heads, kv_heads, inner = counts
    theirs: Any = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner)
    ours = read(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner)
    for size in TENSOR_PARALLEL_SIZES:
        try:
            verify_tensor_parallel(theirs, size)
            is_allowed = True
        except FatalError:
            is_allowed = False
        assert divides(ours, size) == is_allowed


@pytest.mark.parametrize("file", [None, AWQ, FP8, CALIBRATED])
@pytest.mark.parametrize("quantization", ["Auto", "None", "AWQ", "GPTQ", "FP8", "INT4"])
@pytest.mark.parametrize("kv_dtype", ["Auto", "FP8E4M3", "FP8", "INT8"])
def test_what_one_refuses_the_other_refuses(
    file: dict[str, Any] | None, quantization: str, kv_dtype: str, tmp_path: Path
) -> None:
    values = {"architectures": [GENERATORS[0]], **TINY, "quantization_config": file}
    (tmp_path / "config.json").write_text(json.dumps(values))
    engine = {"quantization": quantization, "kvCacheDtype": kv_dtype}
    service = make_service({"engine": engine, "resources": {"gpu": {"count": 0}}})
    flag = None if quantization == "Auto" else flag_value(quantization)
    try:
        config = load_model_config(tmp_path, quantization=flag)
        verify_kv_cache_dtype(config, flag_value(kv_dtype))
        reason = None
    except FatalError as error:
        reason = error.reason
    found = check(service.spec, read_checkpoint(values, Tensors())).problems
    assert [problem.reason for problem in found][:1] == ([reason] if reason else [])


def test_the_limits_of_a_plan_are_those_of_the_schema() -> None:
    crd = yaml.safe_load((ROOT / "crds/llmservice.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    fields = spec["engine"]["properties"]
    for name, limits in LIMITS.items():
        field = fields[camel_case(name)]
        assert (field["minimum"], field["maximum"]) == limits


def test_what_is_no_architecture_of_the_engine_is_refused_in_the_same_word() -> None:
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel") as caught:
        read(architectures=["GPT2LMHeadModel"])
    assert caught.value.reason == "UnsupportedArchitecture"
