from __future__ import annotations

import subprocess
import sys

import pytest

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms import PLATFORMS, choose_platform, describe_default
from pagoda_runtime.platforms.cuda import CudaPlatform

CPU = PLATFORMS["cpu"]


def test_a_config_is_completed_with_the_defaults_of_the_platform():
    config = CPU.complete(EngineConfig(model="m", block_size=8))
    assert config.block_size == 8
    assert config.max_num_batched_tokens == CPU.defaults["max_num_batched_tokens"]
    assert CPU.complete(config) is config


def test_a_default_that_depends_on_the_device_is_told_for_each():
    assert describe_default("block_size") == "32 with a CPU, 16 with a GPU"
    assert describe_default("async_scheduling") == "off with a CPU, on with a GPU"
    assert describe_default("max_model_len") is None


def test_auto_takes_the_first_platform_that_is_there(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "is_available", lambda self: False)
    assert choose_platform("auto") is choose_platform("cpu") is CPU
    monkeypatch.setattr(CudaPlatform, "is_available", lambda self: True)
    assert choose_platform("auto") is PLATFORMS["cuda"]


def test_a_device_that_is_not_there_is_an_invalid_flag(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "is_available", lambda self: False)
    for name in ("cuda", "tpu"):
        with pytest.raises(FatalError, match=f"--device is {name}") as caught:
            choose_platform(name)
        assert caught.value.reason == "InvalidFlags"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor_parallel_size": 17}, "--tensor-parallel-size .* is 17; .* at most 16"),
        ({"tensor_parallel_size": 4, "deterministic": True}, "at most 2 ranks, and .* is 4"),
        ({"kv_cache_dtype": "fp4"}, "--kv-cache-dtype .* is fp4; .* Set it to auto or fp8 or"),
        ({"dtype": "int4"}, "--dtype .* is int4; it must be auto, bfloat16"),
    ],
)
def test_what_a_platform_cannot_serve_is_named_with_the_remedy(fields, words):
    with pytest.raises(FatalError, match=words):
        CPU.verify(EngineConfig(model="m", **fields))


def test_there_is_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    cuda = PLATFORMS["cuda"]
    cuda.verify_ranks(2)
    used: list[int] = []
    monkeypatch.setattr("torch.accelerator.set_device_index", used.append)
    cuda.use_device(1)
    CPU.use_device(1)
    assert used == [1]
    assert [cuda.device(rank).index for rank in range(2)] == [0, 1]
    with pytest.raises(FatalError, match=r"is 4, but there are 2 devices .*gpu\.count") as caught:
        cuda.verify_ranks(4)
    assert caught.value.reason == "InvalidFlags"


@pytest.mark.parametrize(("size", "threads", "share"), [(1, 8, 1.0), (2, 4, 0.5), (9, 1, 1 / 9)])
def test_ranks_divide_the_threads_and_the_default_cache_of_a_cpu(size, threads, share):
    config = EngineConfig(model="m", num_threads=8, tensor_parallel_size=size)
    assert CPU.num_threads(config) == threads
    whole = CPU.memory_budget(EngineConfig(model="m"), 0).available_bytes
    assert CPU.memory_budget(config, 0).available_bytes == pytest.approx(whole * share, rel=0.1)


def test_the_budget_of_a_gpu_is_what_utilization_weights_and_a_step_leave(monkeypatch):
    gib = 2**30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (60 * gib, 80 * gib))
    config = EngineConfig(model="m", gpu_memory_utilization=0.9)
    budget = PLATFORMS["cuda"].memory_budget(config, 2 * gib)
    assert budget.available_bytes == pytest.approx(50 * gib, rel=1e-6)
    assert "--gpu-memory-utilization" in budget.knob


def test_the_help_of_flags_takes_no_torch_with_it():
    code = "import sys, pagoda_runtime.platforms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
