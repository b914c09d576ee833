"""The steps of a GPU on Triton's kernels: recorded, padded, and begun ahead."""

from __future__ import annotations

import random
from pathlib import Path

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import CpuAsDevice, transformers_tokens
from pagoda_runtime.ipc.messages import EngineRequest
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import make_scheduler_config

NUM_TOKENS = 4


def make_prompts() -> list[list[int]]:
    random_ = random.Random(0)
    return [[random_.randrange(3, 320) for _ in range(length)] for length in (1, 6, 13)]


def make_runner(folder, **flags) -> ModelRunner:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        block_size=8,
        max_model_len=32,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 20,
        num_threads=1,
        **flags,
    )
    return ModelRunner(config, platform=CpuAsDevice())


def run(runner: ModelRunner, prompts: list[list[int]], *, slots: int = 2, budget: int = 64):
    """Of each prompt its tokens, with logprobs that are equal only if the logits' bits are."""
    config = make_scheduler_config(
        runner.ready_facts,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        eos_token_ids=[],
        enable_prefix_caching=False,
    )
    core = EngineCore(runner, config, overlap=True)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=2)
    for number, prompt in enumerate(prompts):
        core.add(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=prompt,
                sampling_params=params,
                arrival_seconds=0.0,
            )
        )
    found = [[] for _ in prompts]
    while core.has_work:
        for delta in core.step(0.0).deltas:
            entry = delta.logprobs[0]
            found[int(delta.request_id)].append((entry.token_id, entry.logprob, *entry.top))
    return found


def make_folder(tmp_path) -> Path:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return make_tiny_checkpoint(tmp_path, "gemma3_text", **layers)


def test_replayed_steps_give_the_tokens_of_transformers(tmp_path):
    runner, prompts = make_runner(make_folder(tmp_path)), make_prompts()
    before = runner.platform.num_replays
    found = [[entry[0] for entry in entries] for entries in run(runner, prompts, budget=10)]
    assert found == transformers_tokens(tmp_path, prompts, NUM_TOKENS)
    assert runner.platform.num_replays > before


def test_with_deterministic_a_request_has_the_same_bits_alone_in_a_batch_and_in_chunks(tmp_path):
    runner, prompts = make_runner(make_folder(tmp_path), deterministic=True), make_prompts()
    alone = run(runner, prompts, slots=1)
    assert run(runner, prompts, budget=9) == alone
