"""--deterministic: the same bits whatever the batch, the chunks, preemptions and cache hits.

Without the flag some of these comparisons fail on processors whose products sum in an order that
depends on the number of rows (seen with fp32 on AVX512).
"""

from __future__ import annotations

import random
from operator import itemgetter

import pytest

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import make_core

BLOCK_SIZE = 8


# A family, its dtype, that of its keys and values, and the device.
KINDS = [
    ("llama", "bfloat16", "auto", "cpu"),
    ("gemma3_text", "bfloat16", "auto", "cpu"),
    ("llama", "float32", "auto", "cpu"),
    ("gemma3_text", "float32", "auto", "cpu"),
    ("llama", "bfloat16", "fp8_e4m3", "cpu"),
    ("gemma3_text", "bfloat16", "int8", "cpu"),
    ("gemma3_text", "float32", "fp8_e5m2", "cpu"),
    # With graphs, whose steps are padded.
    *(
        pytest.param((family, dtype, "auto", "cuda"), marks=pytest.mark.gpu)
        for family in ("llama", "gemma3_text")
        for dtype in ("bfloat16", "float32")
    ),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def runner(request, tmp_path_factory):
    family, dtype, kv_cache_dtype, device = request.param
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), family)
    return ModelRunner(
        EngineConfig(
            model=str(folder),
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            num_threads=1,
            block_size=BLOCK_SIZE,
            max_model_len=256,
            kv_cache_memory_bytes=8 * 2**20,
            deterministic=True,
        )
    )


def run(
    runner: ModelRunner,
    prompts: list[list[int]],
    *,
    num_blocks: int = 200,
    budget: int = 512,
    slots: int = 16,
    rounds: int = 1,
    overlap: bool = False,
    kinds: tuple[dict, dict] = ({"temperature": 0.0, "logprobs": 3}, {"logprobs": 3}),
) -> tuple[list[list[tuple]], EngineCore]:
    """Every token of each prompt with its logprobs: equal only if the logits' bits are.

    Args:
        kinds: SamplingParams of every other prompt.
    """
    core = make_core(
        runner,
        overlap=overlap,
        num_blocks=num_blocks,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        long_prefill_token_threshold=budget,
        eos_token_ids=[],
    )
    found: list[list[tuple]] = []
    for _ in range(rounds):
        found = [[] for _ in prompts]
        for number, prompt in enumerate(prompts):
            params = SamplingParams(
                seed=number, max_tokens=12, ignore_eos=True, **kinds[number % 2]
            )
            core.add(
                EngineRequest(
                    request_id=str(number),
                    prompt_token_ids=prompt,
                    sampling_params=params,
                    arrival_seconds=0.0,
                )
            )
        while core.has_work:
            for delta in core.step(0.0).deltas:
                found[int(delta.request_id)].append(
                    (delta.index, delta.new_token_ids, delta.cumulative_logprob, delta.logprobs)
                )
    core.close()
    return [sorted(some, key=itemgetter(0)) for some in found], core


@pytest.fixture(scope="module")
def prompts():
    random_ = random.Random(0)
    shared = random_.choices(range(3, 300), k=20)
    return [
        (shared if i % 2 else []) + random_.choices(range(3, 300), k=random_.randint(5, 60))
        for i in range(16)
    ]


@pytest.fixture(scope="module")
def alone(runner, prompts):
    """Each prompt as the only one, at its own place in the list of seeds."""
    return run(runner, prompts, slots=1)[0]


def test_in_a_batch_as_alone(runner, prompts, alone):
    assert run(runner, prompts)[0] == alone


def test_in_small_chunks_as_in_one_piece(runner, prompts, alone):
    assert run(runner, prompts, budget=21)[0] == alone
    assert run(runner, prompts, budget=7)[0] == alone


def test_with_cache_hits_as_without(runner, prompts, alone):
    found, core = run(runner, prompts, rounds=2)
    assert core.scheduler.prefix_cache_hits > 300
    assert found == alone


def test_with_preemptions_as_without(runner, prompts, alone):
    found, core = run(runner, prompts, num_blocks=24)
    assert core.scheduler.preemptions_total > 0
    assert found == alone


def test_choices_and_beams_planned_ahead_with_preemptions_as_alone(runner, prompts):
    kinds = {"n": 2, "logprobs": 3}, {"temperature": 0.0, "n": 2, "use_beam_search": True}
    alone, _ = run(runner, prompts, slots=2, kinds=kinds)
    found, core = run(runner, prompts, num_blocks=24, overlap=True, kinds=kinds)
    assert core.scheduler.preemptions_total > 0
    assert found == alone
