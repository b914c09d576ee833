"""What preflight says of a spec and a model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pagoda_operator.checkpoint import Checkpoint, Tensors, read_checkpoint
from pagoda_operator.gpus import GIB, GpuMemory, find_gpu, memory_of
from pagoda_operator.pod import PRODUCT_LABEL
from pagoda_operator.preflight import Preflight, check
from pagoda_operator.sizing import size_engine
from pagoda_operator.spec import Engine, LLMServiceSpec
from pagoda_operator.testing import LLAMA_8B, make_service

L4, H100 = "NVIDIA-L4", "NVIDIA-H100-80GB-HBM3"


def spec_on(product: str | None, **engine: Any) -> LLMServiceSpec:
    gpu = {"products": [product]} if product else {}
    return make_service({"engine": engine, "resources": {"gpu": gpu}}).spec


def model(tensors: Tensors = Tensors(), **config: Any) -> Checkpoint:  # noqa: B008
    return read_checkpoint({**LLAMA_8B, **config}, tensors)


def run(product: str | None, checkpoint: Checkpoint | None = None, **engine: Any) -> Preflight:
    return check(spec_on(product, **engine), checkpoint or model())


def problem(found: Preflight) -> tuple[str, str]:
    (cause,) = found.problems
    assert cause.is_stalled
    return cause.reason, cause.message


def test_the_formula_gives_what_an_h100_measured() -> None:
    # 2026-11-26: 14.96 GiB of weights, 27,844 blocks in 54.38 GiB of a card of 79.2 GiB.
    fit = size_engine(model(), Engine(), GpuMemory("H100", int(79.2 * GIB)))
    assert fit is not None
    assert fit.weight_bytes / GIB == pytest.approx(14.96, abs=0.01)
    assert fit.num_tokens / 16 == pytest.approx(27_844, rel=0.005)


def test_a_model_that_fits_says_how_much_fits_beside_it() -> None:
    found = run(H100, maxModelLen=8192)
    assert not found.problems
    assert not found.warnings
    fields = found.fields()
    assert (fields["result"], fields["gpu"], fields["maxModelLen"]) == ("Passed", H100, 8192)
    assert fields["concurrentRequests"] == fields["kvCacheTokens"] // 8192
    assert fields["weights"] == "15316Mi"


def test_an_engine_that_is_asked_for_no_length_takes_what_fits() -> None:
    found = run(L4)
    assert not found.problems
    assert "engine.maxModelLen will be about" in found.warnings[0]
    assert found.fit is not None
    assert found.fit.num_requests == 1


def test_a_length_that_does_not_fit_is_refused_with_a_smaller_one_that_does() -> None:
    reason, message = problem(run(L4, maxModelLen=40_000))
    assert reason == "DoesNotFit"
    assert "40000 tokens needs" in message
    (fitting,) = re.findall(r"maxModelLen to at most (\d+)", message)
    assert not run(L4, maxModelLen=int(fitting)).warnings
    assert run(L4, maxModelLen=int(fitting) + 16).warnings


@pytest.mark.parametrize(
    ("wanted", "changed"),
    [
        ("engine.kvCacheDtype to FP8", {"kvCacheDtype": "FP8"}),
        ("engine.quantization to FP8", {"quantization": "FP8"}),
        ("engine.tensorParallelSize to 2", {"tensorParallelSize": 2}),
    ],
)
def test_each_remedy_makes_it_fit(wanted: str, changed: dict[str, Any]) -> None:
    asked = {"maxModelLen": 40_000}
    assert wanted in problem(run(L4, **asked))[1]
    assert run(L4, **asked, **changed).fields()["result"] == "Passed"


def test_weights_that_do_not_fit_name_a_gpu_that_is_large_enough() -> None:
    seventy = model(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    )
    reason, message = problem(run(H100, seventy))
    assert reason == "DoesNotFit"
    assert "nothing is left" in message
    assert "tensorParallelSize to 2" in message
    assert "NVIDIA-B200" in message


def test_what_only_the_estimate_speaks_against_is_a_warning() -> None:
    found = run(L4, maxModelLen=24_000)
    assert not found.problems
    assert found.warnings[0].startswith("It may not fit.")


@pytest.mark.parametrize(
    ("engine", "config", "reason", "what"),
    [
        ({"tensorParallelSize": 3}, {}, "InvalidFlags", "Set it to one of: 1, 2, 4, 8, 16."),
        ({"maxModelLen": 200_000}, {}, "InvalidFlags", "Set it to at most 131072."),
        ({"quantization": "AWQ"}, {}, "QuantizationMismatch", "is not quantized"),
        (
            {"quantization": "GPTQ"},
            {"quantization_config": {"quant_method": "awq"}},
            "QuantizationMismatch",
            "is quantized by awq",
        ),
        (
            {},
            {"quantization_config": {"quant_method": "awq", "group_size": 96}},
            "QuantizationMismatch",
            "no multiple of the group_size 96",
        ),
    ],
)
def test_what_an_engine_would_refuse_is_refused_with_its_reason(
    engine: dict[str, Any], config: dict[str, Any], reason: str, what: str
) -> None:
    found = run(H100, model(**config), **engine).problems[0]
    assert (found.reason, found.is_stalled) == (reason, True)
    assert what in found.message


def test_the_size_of_a_quantized_model_is_that_of_its_tensors() -> None:
    awq = {"quantization_config": {"quant_method": "awq", "group_size": 128}}
    assert "size of the weights is not known" in run(H100, model(**awq)).warnings[0]
    found = run(L4, model(Tensors(6 * GIB), **awq))
    assert found.fit is not None
    assert found.fit.weight_bytes == 6 * GIB


def test_a_model_that_embeds_has_no_kv_cache() -> None:
    bert = model(Tensors(GIB), architectures=["BertModel"])
    found = run(L4, bert)
    assert found.fields()["kvCacheTokens"] == 0
    assert problem(run(L4, model(Tensors(50 * GIB), architectures=["BertModel"])))[1].startswith(
        "The model does not fit"
    )


@pytest.mark.parametrize(
    ("product", "engine", "what"),
    [
        (None, {}, "names no GPU"),
        ("NVIDIA-X1", {}, "The memory of NVIDIA-X1"),
        (L4, {"extraArgs": ["--kv-cache-memory-bytes=1"]}, "--kv-cache-memory-bytes of"),
    ],
)
def test_what_cannot_be_sized_is_a_warning(
    product: str | None, engine: dict[str, Any], what: str
) -> None:
    found = run(product, **engine)
    assert not found.problems
    assert what in found.warnings[0]


def test_an_engine_on_the_cpu_is_checked_but_not_sized() -> None:
    spec = make_service({"resources": {"gpu": {"count": 0}}}).spec
    assert check(spec, model()).fields() == {"result": "Passed"}


def test_of_several_gpus_the_smallest_counts_and_a_slice_names_its_own_memory() -> None:
    products = {"gpu": {"products": [H100, L4]}}
    found = find_gpu(make_service({"resources": products}).spec)
    assert found == memory_of(L4)
    mig = {"gpu": {"resourceName": "nvidia.com/mig-3g.40gb"}}
    found = find_gpu(make_service({"resources": mig}).spec)
    assert found == GpuMemory("nvidia.com/mig-3g.40gb", 38 * GIB)
    assert memory_of("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb") is not None
    assert memory_of("NVIDIA-L4-SHARED") is not None
    chosen = {"resources": products, "podTemplate": {"nodeSelector": {PRODUCT_LABEL: H100}}}
    assert find_gpu(make_service(chosen).spec) == memory_of(H100)


@pytest.mark.parametrize("extreme", [1, 2**31 - 1])
@pytest.mark.parametrize("size", [1, 16])
def test_whatever_a_file_says_the_status_can_be_written(extreme: int, size: int) -> None:
    keys = [key for key, value in LLAMA_8B.items() if type(value) is int]
    rope = {"rope_scaling": {"rope_type": "yarn", "factor": 1e300}}
    large = model(Tensors(2**60 - 1), **dict.fromkeys(keys, extreme), **rope)
    for engine in ({}, {"maxModelLen": 1000}):
        found = run(L4, large, tensorParallelSize=size, **engine)
        fields = found.fields()
        assert all(len(text) <= 1024 for text in fields.get("warnings", []))
        for name in ("weights", "overhead", "kvCache"):
            assert len(fields.get(name, "")) <= 32
        for name in ("kvCacheTokens", "maxModelLen", "concurrentRequests"):
            assert 0 <= fields.get(name, 0) <= 10**12
