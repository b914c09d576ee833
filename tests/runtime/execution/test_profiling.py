from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.profiling import largest_steps
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.steps import StepRunner
from pagoda_runtime.execution.testing import CpuAsDevice
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.platforms import PLATFORMS, MemoryBudget, MemoryUse, Record, Replay

MIB = 2**20


class Counted(CpuAsDevice):
    """Says of each piece of work that it took one MiB more than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.num_measured = 0
        self.step_bytes = 0

    def measure(self, run: Callable[[], object]) -> MemoryUse:
        run()
        self.num_measured += 1
        return MemoryUse(peak_bytes=100 * MIB, kept_bytes=self.num_measured * MIB)

    def memory_budget(self, config: EngineConfig, step_bytes: int) -> MemoryBudget:
        self.step_bytes = step_bytes
        return MemoryBudget(8 * MIB, "--gpu-memory-utilization")


class Full(CpuAsDevice):
    def measure(self, run: Callable[[], object]) -> MemoryUse:
        run()
        raise torch.OutOfMemoryError("Tried to allocate 3 GiB.")


class WithoutRoomForGraphs(CpuAsDevice):
    cache_flag = PLATFORMS["cuda"].cache_flag

    def recorder(self) -> Record:
        def record(run: Callable[[], None]) -> Replay:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")

        return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def make_runner(folder, platform, **flags) -> ModelRunner:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        num_threads=1,
        max_num_seqs=6,
        max_num_batched_tokens=100,
        max_model_len=64,
        **flags,
    )
    return ModelRunner(config, platform=platform, backend=ReferenceAttention)


def test_the_largest_steps_and_the_graphs_are_measured_before_the_cache_is_sized(
    folder, monkeypatch
):
    steps = []

    def execute(runner, rows, copies=()):
        steps.append((len(runner.attention.kv_caches[0].numbers), rows))
        return runner.submit(rows, copies).result()

    monkeypatch.setattr(StepRunner, "execute", execute)
    platform = Counted()
    runner = make_runner(folder, platform)
    # Steps of 1, 2, 4 and 6 rows: the largest takes 2 MiB, and each of the others 3.
    assert platform.step_bytes == (100 + 2 + 3 * 3) * MIB
    (prompts_blocks, prompts), (contexts_blocks, contexts) = steps
    assert prompts_blocks == contexts_blocks == 1
    assert [len(row.token_ids) for row in prompts] == [64, 8, 7, 7, 7, 7]
    assert [row.start for row in contexts] == [63] * 6
    assert len(runner.attention.kv_caches[0].numbers) == runner.num_blocks + 1 > 1


def test_without_graphs_none_are_measured(folder):
    platform = Counted()
    make_runner(folder, platform, enforce_eager=True)
    assert platform.step_bytes == 100 * MIB
    assert platform.num_replays == 0


def test_a_device_that_is_full_names_the_step_and_the_flags(folder):
    with pytest.raises(FatalError, match="100 tokens and 6 sequences") as caught:
        make_runner(folder, Full())
    assert "Tried to allocate 3 GiB." in caught.value.message
    assert "--max-num-batched-tokens or --max-num-seqs" in caught.value.message
    assert caught.value.reason == Full.out_of_memory


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "--gpu-memory-utilization (engine.gpuMemoryPercent)"),
        ({"kv_cache_memory_bytes": 8 * MIB}, "--kv-cache-memory-bytes"),
    ],
)
def test_graphs_that_find_no_memory_name_the_flag_that_took_it(folder, flags, named):
    with pytest.raises(FatalError, match="graphs beside it, do not fit") as caught:
        make_runner(folder, WithoutRoomForGraphs(), **flags)
    assert "Tried to allocate 2 GiB." in caught.value.message
    assert f"Lower {named} or --max-num-seqs (engine.maxNumSeqs)" in caught.value.message
    assert caught.value.reason == WithoutRoomForGraphs.out_of_memory


@pytest.mark.parametrize(
    ("num_tokens", "num_seqs", "max_model_len", "counts"),
    [
        (2048, 256, 8192, [1793] + [1] * 255),
        (512, 256, 100, [100] + [2] * 157 + [1] * 98),
        (10, 256, 100, [1] * 10),
        (1000, 3, 100, [100] * 3),
        (7, 1, 100, [7]),
    ],
)
def test_the_largest_step_has_all_tokens_and_all_sequences(
    num_tokens, num_seqs, max_model_len, counts
):
    config = EngineConfig(model="", max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs)
    prompts, contexts = largest_steps(config, 16, max_model_len)
    assert [len(row.token_ids) for row in prompts] == counts
    assert all(len(row.block_table) == -(-max_model_len // 16) for row in contexts)
