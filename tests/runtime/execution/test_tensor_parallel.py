"""Two ranks in threads of this process, in lockstep, beside one that has the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pagoda_runtime import testing
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.runner import ModelRunner, StepDone, no_progress
from pagoda_runtime.ipc.messages import BlockCopy, EngineRequest, ScheduledRow
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.parallel import connect
from pagoda_runtime.sampling_params import SamplingParams

# 323 tokens: ranks cannot divide them evenly.
FAMILIES = {
    "llama": {"vocab_size": 323},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
BLOCK_SIZE = 8
SHARED = list(range(30, 47))
PROMPTS = [[5, 6, 7], [*SHARED, 9], list(range(100, 140)), [*SHARED, 200, 11, 60]]


class Lockstep:
    """Ranks that execute each step together; all must say the same of it."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        size = config.tensor_parallel_size
        self.threads = ThreadPoolExecutor(size)

        def make(rank: int) -> ModelRunner:
            parallel = connect(rank, size, str(folder), torch.device("cpu"), backend="gloo")
            return ModelRunner(config, no_progress, parallel)

        self.ranks = list(self.threads.map(make, range(size)))
        self.ready_facts = self.ranks[0].ready_facts

    def submit(self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()) -> StepDone:
        outputs = list(self.threads.map(lambda rank: rank.execute(rows, copies), self.ranks))
        assert all(output == outputs[0] for output in outputs)
        return StepDone(outputs[0])


def make_config(folder: Path, size: int, **flags: object) -> EngineConfig:
    values = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "num_threads": 1} | flags
    return EngineConfig(
        model=str(folder),
        device="cpu",
        tensor_parallel_size=size,
        block_size=BLOCK_SIZE,
        max_model_len=256,
        **values,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            of = "llama" if family == "biased" else family
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_tiny_checkpoint(folder, of, **FAMILIES[family])
        return made[family]

    return make


@pytest.fixture
def pair(folders, tmp_path):
    """One rank and two of a family."""

    def make(family: str, **flags: object) -> tuple[ModelRunner, Lockstep]:
        folder = folders(family)
        one = ModelRunner(make_config(folder, 1, **flags))
        return one, Lockstep(make_config(folder, 2, **flags), tmp_path)

    return make


def run(core: EngineCore, params: Sequence[SamplingParams]):
    """All deltas of a request for each prompt and each of params, and the last statistics."""
    told = {}
    for number, some in enumerate(params):
        for index, prompt in enumerate(PROMPTS):
            name = f"{number}.{index}"
            told[name] = []
            core.add(
                EngineRequest(
                    request_id=name,
                    prompt_token_ids=prompt,
                    sampling_params=some,
                    arrival_seconds=0.0,
                )
            )
    while core.has_work:
        output = core.step(0.0)
        core.check()
        for delta in output.deltas:
            told[delta.request_id].append(delta)
    return told, output.stats


def tokens_of(told):
    """By request and choice; in which order choices come depends on preemptions."""
    found: dict[tuple[str, int], list[int]] = {}
    for name, deltas in told.items():
        for delta in deltas:
            found.setdefault((name, delta.index), []).extend(delta.new_token_ids)
    return found


def make_core(runner, num_blocks=None, **limits):
    return testing.make_core(
        runner,
        num_blocks=num_blocks or runner.ready_facts.num_blocks,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        **limits,
    )


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = [
    GREEDY,
    SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=8, presence_penalty=0.5),
    SamplingParams(temperature=0.0, use_beam_search=True, n=3, max_tokens=6),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_tokens_of_one(pair, family):
    """With chunks, a shared prefix, forks, beams, and blocks for a part of it all at a time."""
    one, two = pair(family)
    expected, _ = run(make_core(one, enable_prefix_caching=True), KINDS)
    assert len(set(map(tuple, tokens_of(expected).values()))) > 20
    core = make_core(two, num_blocks=24, enable_prefix_caching=True)
    told, stats = run(core, KINDS)
    assert tokens_of(told) == tokens_of(expected)
    assert stats.preemptions_total > 0
    assert stats.prefix_cache_hits > 0
