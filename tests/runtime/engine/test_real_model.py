"""The core on a tiny random checkpoint: batching, caching and preemption change no token."""

from __future__ import annotations

import random

import pytest

from pagoda_runtime import testing
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest, EngineStats
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams

FAMILIES = ("llama", "gemma3_text", "mistral")
BLOCK_SIZE = 8
NUM_OUTPUT_TOKENS = 16


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRunner]:
    return {
        family: ModelRunner(
            EngineConfig(
                model=str(make_tiny_checkpoint(tmp_path_factory.mktemp(family), family)),
                dtype="float32",
                device="cpu",
                num_threads=1,
                block_size=BLOCK_SIZE,
                max_model_len=256,
                kv_cache_memory_bytes=8 * 2**20,
            )
        )
        for family in FAMILIES
    }


def make_core(
    runner: ModelRunner,
    *,
    num_blocks: int | None = None,
    caching: bool = False,
    slots: int = 16,
    overlap: bool = False,
) -> EngineCore:
    return testing.make_core(
        runner,
        num_blocks=num_blocks or runner.num_blocks,
        max_num_seqs=slots,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=64,
        max_num_waiting=2000,
        eos_token_ids=[2],
        enable_prefix_caching=caching,
        overlap=overlap,
    )


def make_requests(params: SamplingParams) -> list[EngineRequest]:
    """16 prompts of 5 to 50 tokens, half of which begin alike."""
    random_ = random.Random(0)
    shared = random_.choices(range(3, 300), k=20)
    prompts = [
        (shared if i % 2 else []) + random_.choices(range(3, 300), k=random_.randint(5, 30))
        for i in range(16)
    ]
    return [
        EngineRequest(
            request_id=f"r{i}", prompt_token_ids=prompt, sampling_params=params, arrival_seconds=0.0
        )
        for i, prompt in enumerate(prompts)
    ]


def run(core: EngineCore, requests: list[EngineRequest]) -> tuple[list[list[int]], EngineStats]:
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        output = core.step(0.0)
        core.check()
        for delta in output.deltas:
            outputs[delta.request_id] += delta.new_token_ids
    return [outputs[request.request_id] for request in requests], output.stats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_alone_in_a_batch_with_prefix_hits_and_with_preemption(
    runners, family, temperature
):
    runner = runners[family]
    requests = make_requests(
        SamplingParams(
            temperature=temperature, seed=11, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True
        )
    )
    alone = [run(make_core(runner), [request])[0][0] for request in requests]
    assert len({tuple(tokens) for tokens in alone}) == 16

    batched, _ = run(make_core(runner), requests)
    assert batched == alone

    core = make_core(runner, caching=True)
    run(core, requests)
    cached, stats = run(core, requests)
    assert stats.prefix_cache_hits > 0
    assert cached == alone

    for caching in (False, True):
        preempted, stats = run(make_core(runner, num_blocks=16, caching=caching), requests)
        # Blocks behind a window come back soon enough.
        assert stats.preemptions_total > 0 or runner.ready_facts.sliding_window
        assert preempted == alone

    core = make_core(runner, num_blocks=16, caching=True, overlap=True)
    planned_ahead, stats = run(core, requests)
    core.close()
    assert planned_ahead == alone


def test_a_model_whose_layers_all_have_a_window_gives_blocks_back(runners):
    runner = runners["mistral"]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    request = EngineRequest(
        request_id="r", prompt_token_ids=[5, 6, 7], sampling_params=params, arrival_seconds=0.0
    )
    core = make_core(runner)
    assert core.scheduler.block_tables.sliding_window == 12
    core.add(request)
    most, tokens = 0, []
    while core.has_work:
        tokens += core.step(0.0).deltas[0].new_token_ids
        most = max(most, core.scheduler.block_pool.num_used)
    # 12 tokens touch at most 3 blocks of 8; the whole would take 13.
    assert most == 3
    kept = make_core(runner)
    kept.scheduler.block_tables.sliding_window = 0
    assert run(kept, [request])[0] == [tokens]


def test_all_blocks_return_after_a_thousand_random_requests_with_aborts(runners):
    random_ = random.Random(1)
    core = make_core(runners["llama"], num_blocks=40, caching=True, slots=32)
    aborted = 0
    for i in range(1000):
        prompt = random_.choices(range(3, 6), k=random_.randint(1, 24))
        core.add(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=random_.randint(1, 8)),
                arrival_seconds=0.0,
            )
        )
        if i % 4 == 0:
            core.step(0.0)
        if random_.random() < 0.3:
            before = len(core.scheduler.requests)
            core.abort([f"r{random_.randint(max(0, i - 30), i)}"])
            aborted += before - len(core.scheduler.requests)
    while core.has_work:
        output = core.step(0.0)
    core.check()
    assert aborted > 100
    assert output.stats.finished_total == 1000
    assert core.scheduler.block_pool.num_free == core.scheduler.block_pool.num_blocks
