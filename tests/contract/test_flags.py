"""What the operator renders is what the runtime's command line reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec import to_builtins

from pagoda_operator.causes import find_cause
from pagoda_operator.flags import API_KEYS_PATH, PORT, engine_args, flag_value, pull_args
from pagoda_operator.pod import CREDENTIALS
from pagoda_operator.reports import parse_report
from pagoda_operator.spec import DType, KvCacheDtype, Quantization
from pagoda_operator.testing import make_pod, make_service
from pagoda_runtime import engine_flags
from pagoda_runtime.cli import build_parser
from pagoda_runtime.config import KV_CACHE_DTYPES, ServerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.memory import kv_dtype_name
from pagoda_runtime.keys import ApiKeys
from pagoda_runtime.models import oci
from pagoda_runtime.models.check import verify_start, verify_supported
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.quantization.config import ONLINE, READERS
from pagoda_runtime.server.answers import Running
from pagoda_runtime.server.flags import parse_serve_args

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def parse(spec: dict[str, Any]) -> ServerConfig:
    command, *args = engine_args(make_service(spec))
    assert command == "serve"
    return parse_serve_args(args)


def test_every_field_of_the_spec_arrives_in_the_configuration() -> None:
    config = parse(
        {
            "model": {"uri": "pvc://models/gemma-3-270m", "name": "gemma", "aliases": ["small"]},
            "auth": {"apiKeysSecretRef": {"name": "keys"}},
            "engine": {
                "dtype": "Float16",
                "tensorParallelSize": 2,
                "quantization": "AWQ",
                "kvCacheDtype": "FP8E5M2",
                "maxModelLen": 4096,
                "maxNumSeqs": 12,
                "maxNumBatchedTokens": 300,
                "blockSize": 64,
                "gpuMemoryPercent": 85,
                "prefixCaching": False,
                "extraArgs": ["--seed", "7", "--num-threads=2"],
            },
            "lifecycle": {"drainSeconds": 90, "stallSeconds": 45},
        }
    )
    engine = config.engine
    assert config.served_model_name == ("gemma", "small")
    assert (config.host, config.port) == ("0.0.0.0", PORT)
    assert (engine.model, engine.device) == ("/models/gemma-3-270m", "cuda")
    assert (engine.dtype, engine.tensor_parallel_size) == ("float16", 2)
    assert (engine.quantization, engine.kv_cache_dtype) == ("awq", "fp8_e5m2")
    assert (engine.max_model_len, engine.max_num_seqs) == (4096, 12)
    assert (engine.max_num_batched_tokens, engine.block_size) == (300, 64)
    assert engine.gpu_memory_utilization == 0.85
    assert engine.enable_prefix_caching is False
    assert (engine.seed, engine.num_threads) == (7, 2)
    assert config.api_key_file == "/etc/pagoda/api-keys"
    assert (config.drain_seconds, engine.stall_seconds) == (90, 45)


@pytest.mark.parametrize(
    "uri", ["https://models.example.com:8443/team/llama", "oci://ghcr.io/team/llama:v1"]
)
def test_the_address_of_a_server_arrives_as_it_is(uri: str) -> None:
    assert parse({"model": {"uri": uri}}).engine.model == uri


def test_the_variable_for_a_registrys_secret_is_the_one_that_the_engine_reads() -> None:
    assert CREDENTIALS["oci"] == (oci.AUTH_VARIABLE,)


def test_the_job_that_fills_a_claim_fetches_what_the_engine_will_ask_for() -> None:
    model = {"uri": "hf://org/model", "revision": "v1"}
    args = build_parser().parse_args(pull_args(make_service({"model": model})))
    engine = parse({"model": model}).engine
    assert (args.command, args.model, args.revision) == ("pull", engine.model, engine.revision)


def test_a_revision_of_the_hub_arrives_in_the_configuration() -> None:
    config = parse({"model": {"uri": "hf://org/name", "revision": "v1.0"}})
    assert (config.engine.model, config.engine.revision) == ("hf://org/name", "v1.0")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_asks_for_nothing_that_the_engine_refuses(example: Path) -> None:
    config = parse(yaml.safe_load(example.read_text())["spec"]).engine
    verify_supported(config)
    assert config.quantization in (None, "none", *ONLINE, *READERS)


def cause_of(error: FatalError, spec: dict[str, Any]) -> str:
    """What the status says of an engine that ended with this error."""
    last_words = json.dumps({"reason": error.reason, "message": error.message})
    terminated = {"state": {"terminated": {"exitCode": 2, "message": last_words}}}
    pods = [make_pod("rev", container=terminated)]
    cause = find_cause(make_service(spec).spec, {"metadata": {"generation": 0}}, pods, "rev")
    assert cause is not None
    return cause.message


def test_a_secret_without_a_key_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FatalError) as error:
        ApiKeys(path=str(tmp_path))
    error.value.message = error.value.message.replace(str(tmp_path), API_KEYS_PATH)
    words = cause_of(error.value, {"auth": {"apiKeysSecretRef": {"name": "keys"}}})
    assert words.startswith(
        "The Secret keys of spec.auth.apiKeysSecretRef cannot be used: it holds"
    )


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--seed=much"], "argument --seed: 'much' is not an integer"),
        (["--num-threads"], "argument --num-threads"),
        (["stray"], "MODEL is 'stray'"),
    ],
)
def test_a_wrong_extra_argument_is_told_by_its_field_of_the_spec(
    extra_args: list[str], words: str
) -> None:
    spec = {"engine": {"extraArgs": extra_args}}
    with pytest.raises(FatalError) as error:
        parse(spec)
    found = cause_of(error.value, spec)
    assert found.startswith("spec.engine.extraArgs: ")
    assert words in found


def test_the_least_spec_leaves_the_runtimes_own_defaults() -> None:
    config = parse({"model": {"uri": "hf://org/name"}, "resources": {"gpu": {"count": 0}}})
    plain = parse_serve_args(["hf://org/name", "--device", "cpu", "--served-model-name=chat"])
    assert config == plain


@pytest.mark.parametrize("percent", range(10, 99))
def test_every_share_of_gpu_memory_is_exact(percent: int) -> None:
    config = parse({"engine": {"gpuMemoryPercent": percent}})
    assert config.engine.gpu_memory_utilization == pytest.approx(percent / 100)


def test_every_quantization_that_is_offered_is_read_or_made() -> None:
    assert set(engine_flags.QUANTIZATIONS) == {"none", *ONLINE, *READERS}


def test_every_value_of_an_enum_is_one_of_its_flag() -> None:
    assert {*map(flag_value, get_args(DType))} == set(engine_flags.DTYPES)
    assert {*map(flag_value, get_args(Quantization))} == {*engine_flags.QUANTIZATIONS, "auto"}
    assert {*map(flag_value, get_args(KvCacheDtype))} == {*KV_CACHE_DTYPES, "auto"}


def test_what_an_engine_reports_is_told_in_the_words_of_the_spec() -> None:
    def told(quantization: str, kv_cache_dtype: str) -> tuple[str, str]:
        model = to_builtins(Running("LlamaForCausalLM", quantization, kv_cache_dtype, 1))
        found = parse_report(json.dumps({"model": model}).encode())
        return found["quantization"], found["kvCacheDtype"]

    for quantization in engine_flags.QUANTIZATIONS:
        assert told(quantization, "int8")[0] in get_args(Quantization)
    for dtype in map(kv_dtype_name, (torch.bfloat16, torch.float8_e5m2, torch.int8)):
        assert told("none", dtype)[1] in get_args(KvCacheDtype) + get_args(DType)
    assert told("none", kv_dtype_name(torch.float8_e4m3fn)) == ("None", "FP8E4M3")


@pytest.mark.parametrize(
    ("engine", "config", "words"),
    [
        (
            {"quantization": "AWQ"},
            {"quant_method": "gptq"},
            "--quantization awq (engine.quantization) was given, but FOLDER is quantized by gptq",
        ),
        (
            {"kvCacheDtype": "INT8"},
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"targets": ["Linear"], "weights": INT4}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            "--kv-cache-dtype (engine.kvCacheDtype) is int8, but the checkpoint was made for fp8",
        ),
    ],
)
def test_a_spec_against_its_checkpoint_is_stalled_by_name(
    tmp_path: Path, engine: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    make_tiny_checkpoint(tmp_path, quantization_config=config)
    spec = {"engine": engine, "resources": {"gpu": {"count": 0}}}
    with pytest.raises(FatalError) as error:
        verify_start(dataclasses.replace(parse(spec).engine, model=str(tmp_path)))
    assert error.value.reason == "QuantizationMismatch"
    assert words.replace("FOLDER", str(tmp_path)) in cause_of(error.value, spec)


@given(
    dtype=st.sampled_from(get_args(DType)),
    quantization=st.sampled_from(get_args(Quantization)),
    kv_cache_dtype=st.sampled_from(get_args(KvCacheDtype)),
    max_num_seqs=st.integers(1, 65536),
    max_model_len=st.integers(2, 16777216),
)
def test_whatever_the_crd_allows_parses(
    dtype: str, quantization: str, kv_cache_dtype: str, max_num_seqs: int, max_model_len: int
) -> None:
    engine = {
        "dtype": dtype,
        "quantization": quantization,
        "kvCacheDtype": kv_cache_dtype,
        "maxNumSeqs": max_num_seqs,
        "maxModelLen": max_model_len,
    }
    config = parse({"engine": engine}).engine
    assert (config.max_num_seqs, config.max_model_len) == (max_num_seqs, max_model_len)
