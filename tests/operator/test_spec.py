"""Reading an LLMService."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda_operator.decode import SpecError, camel_case
from pagoda_operator.testing import make_service


def test_fields_are_read_from_their_names_in_the_crd() -> None:
    service = make_service(
        {
            "engine": {"quantization": "AWQ", "kvCacheDtype": "FP8E4M3", "extraArgs": ["--a"]},
            "resources": {"gpu": {"products": ["NVIDIA-L4"]}, "cpu": 2, "memory": "4Gi"},
            "autoscaling": {"maxReplicas": 3, "scaleDown": {"stabilizationSeconds": 10}},
        }
    )
    engine = service.spec.engine
    assert (engine.quantization, engine.kv_cache_dtype) == ("AWQ", "FP8E4M3")
    assert engine.extra_args == ("--a",)
    assert service.spec.resources.gpu.products == ("NVIDIA-L4",)
    assert (service.spec.resources.cpu, service.spec.resources.memory) == (2, "4Gi")
    assert service.spec.autoscaling is not None
    assert service.spec.autoscaling.scale_down.stabilization_seconds == 10


def test_the_served_name_is_the_name_of_the_service_unless_the_model_has_one() -> None:
    assert make_service().model_name == "chat"
    assert make_service({"model": {"uri": "hf://a/b", "name": "b"}}).model_name == "b"


def test_absent_gpus_are_as_many_as_the_tensor_parallel_size() -> None:
    assert make_service({"engine": {"tensorParallelSize": 4}}).spec.num_gpus == 4
    assert make_service({"resources": {"gpu": {"count": 0}}}).spec.num_gpus == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"router": {}}, "spec.router: this operator does not know the field"),
        ({"engine": {"dtype": "fp4"}}, "spec.engine.dtype: 'fp4' is none of Auto, BFloat16"),
        ({"replicas": "2"}, "spec.replicas: int"),
        ({"replicas": True}, "spec.replicas: int"),
        ({"autoscaling": {}}, "spec.autoscaling.maxReplicas: the field is required"),
        ({"engine": {"extraArgs": [1]}}, "spec.engine.extraArgs[0]: str is needed, not 1"),
        ({"podTemplate": {"env": ["A=b"]}}, "spec.podTemplate.env[0]"),
        ({"podTemplate": {"containers": []}}, "spec.podTemplate.containers: this operator"),
        ({"resources": {"cpu": True}}, "spec.resources.cpu: int or float or str"),
        ({"model": "hf://a/b"}, "spec.model: an object is needed"),
    ],
)
def test_what_cannot_be_understood_is_named_by_its_path(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as error:
        make_service(spec)
    assert words in str(error.value)


def test_field_names_become_camel_case() -> None:
    assert camel_case("gpu_memory_percent") == "gpuMemoryPercent"
    assert camel_case("from_") == "from"
