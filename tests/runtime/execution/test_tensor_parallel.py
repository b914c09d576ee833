"""Two ranks in threads of this process, in lockstep, beside one that has the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pagoda_kernels.cpu.panels import INT8, has_panels
from pagoda_runtime import testing
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineRequest,
    Masks,
    RowOutput,
    ScheduledRow,
)
from pagoda_runtime.layers.embedding import Embedding, LanguageModelHead
from pagoda_runtime.models import weights
from pagoda_runtime.models.registry import load_model_config, make_model
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.models.weights import load_weights, read_tensors
from pagoda_runtime.parallel import TensorParallel, connect
from pagoda_runtime.platforms import choose_platform
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.config import ONLINE
from pagoda_runtime.quantization.parameter import StoredTensor
from pagoda_runtime.quantization.unquantized import UnquantizedLinear
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
            device = choose_platform(config.device).device(rank)
            parallel = connect(rank, size, str(folder), device, backend="gloo")
            return ModelRunner(config, no_progress, parallel)

        self.ranks = list(self.threads.map(make, range(size)))
        self.ready_facts = self.ranks[0].ready_facts

    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> testing.StepDone:
        def execute(rank: ModelRunner) -> list[RowOutput]:
            return rank.submit(rows, copies, masks).result()

        outputs = list(self.threads.map(execute, self.ranks))
        assert all(output == outputs[0] for output in outputs)
        return testing.StepDone(outputs[0])


def make_config(
    folder: Path, size: int, memory_bytes: int = 1 << 22, **flags: object
) -> EngineConfig:
    values = {"device": "cpu", "dtype": "float32", "num_threads": 1} | flags
    return EngineConfig(
        model=str(folder),
        kv_cache_memory_bytes=memory_bytes,
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


def make_core(runner, num_blocks=None, max_num_seqs=16, **limits):
    return testing.make_core(
        runner,
        num_blocks=num_blocks or runner.ready_facts.num_blocks,
        max_num_seqs=max_num_seqs,
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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_two_ranks_give_the_logprobs_of_one(pair, family):
    one, two = pair(family)
    params = [SamplingParams(temperature=0.0, max_tokens=3, logprobs=3, prompt_logprobs=2)]
    expected, _ = run(make_core(one), params)
    told, _ = run(make_core(two), params)
    for name, deltas in expected.items():
        for delta, found in zip(deltas, told[name], strict=True):
            several = [*(delta.prompt_logprobs or []), *delta.logprobs]
            others = [*(found.prompt_logprobs or []), *found.logprobs]
            for entry, other in zip(several, others, strict=True):
                assert (entry.token_id, entry.rank) == (other.token_id, other.rank)
                assert [token for token, _ in entry.top] == [token for token, _ in other.top]
                assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("quantization", [None, *ONLINE])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_two_ranks_in_bfloat16_are_as_close_to_fp32_as_one(pair, folders, family, quantization):
    exact = ModelRunner(make_config(folders(family), 1))
    one, two = pair(family, dtype="bfloat16", quantization=quantization)
    params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)]

    def logprobs(runner) -> torch.Tensor:
        told, _ = run(make_core(runner), params)
        entries = [entry for deltas in told.values() for entry in deltas[0].prompt_logprobs]
        return torch.tensor([entry.logprob for entry in entries])

    expected = logprobs(exact)
    error, error_of_two = ((logprobs(runner) - expected).abs().mean() for runner in (one, two))
    assert 0 < error_of_two < 1.5 * error


def test_the_bits_of_two_ranks_do_not_depend_on_the_batch_where_they_must_not(pair):
    _, two = pair("qwen3", deterministic=True)
    params = [SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)]
    together, _ = run(make_core(two), params)
    alone, _ = run(make_core(two, max_num_seqs=1), params)
    for name, deltas in alone.items():
        expected = [delta.logprobs for delta in deltas]
        assert [delta.logprobs for delta in together[name]] == expected


@pytest.mark.skipif(not has_panels(INT8), reason="this processor does not multiply int8")
def test_the_best_of_all_ranks_tokens_is_the_largest_logit(tmp_path):
    torch.manual_seed(0)
    table, hidden = torch.randn(512, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    table[300] = table[40]
    cpu = torch.device("cpu")

    def find(rank: int) -> torch.Tensor:
        parallel = connect(rank, 2, str(tmp_path), cpu, backend="gloo")
        placement = Placement(torch.bfloat16, cpu, UnquantizedLinear, parallel)
        embedding = Embedding(512, 64, scale=1.0, placement=placement)
        head = LanguageModelHead(512, 64, tied_to=embedding, placement=placement)
        dict(embedding.shards())[".weight"].load(table)
        embedding.after_loading()
        head.after_loading()
        return head.argmax(hidden)

    expected = (hidden.float() @ table.float().T).argmax(-1)
    assert {int(token) // 256 for token in expected} == {0, 1}
    for found in ThreadPoolExecutor(2).map(find, range(2)):
        assert torch.equal(found, expected)


def test_all_ranks_have_the_blocks_of_the_one_with_least_memory(folders, tmp_path):
    folder = folders("llama")
    threads = ThreadPoolExecutor(2)

    def make(rank: int) -> ModelRunner:
        config = make_config(folder, 2, (1 << 20) * (rank + 1))
        parallel = connect(rank, 2, str(tmp_path), torch.device("cpu"), backend="gloo")
        return ModelRunner(config, no_progress, parallel)

    sizes = [runner.num_blocks for runner in threads.map(make, range(2))]
    # A block takes 2 * 3 layers * 8 tokens * 1 head * 16 dimensions * 4 bytes.
    assert sizes == [(1 << 20) // 3072 - 1] * 2


class CountedTensor:
    """A tensor in its file, and the bytes of it that were asked for."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored, self.num_bytes = stored, 0

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        piece = self.stored[index]
        self.num_bytes += piece.nbytes
        return piece


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "biased"])
def test_a_rank_asks_for_its_share_of_what_is_cut_and_once_for_the_rest(
    folders, monkeypatch, family
):
    folder = folders(family)
    config = load_model_config(folder)
    counted: dict[str, CountedTensor] = {}

    def count(path: Path) -> Iterator[tuple[str, CountedTensor]]:
        for name, stored in read_tensors(path):
            counted[name] = CountedTensor(stored)
            yield name, counted[name]

    monkeypatch.setattr(weights, "read_tensors", count)
    for rank in range(2):
        parallel = TensorParallel(rank, 2)
        placement = Placement(torch.float32, torch.device("cpu"), UnquantizedLinear, parallel)
        model = make_model(config, placement)
        total = load_weights(model.weights(), folder, on_progress=lambda *_: None)
        assert total == sum(stored.num_bytes for stored in counted.values())
        for name, stored in counted.items():
            whole = math.prod(stored.get_shape()) * 4
            is_kv = "k_proj" in name or "v_proj" in name
            # Biases after a cut along the inputs, and heads that are fewer than ranks.
            is_held_by_all = "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias"))
            is_held_by_all |= is_kv and config.num_kv_heads == 1
            assert stored.num_bytes == (whole if is_held_by_all else whole // 2), name


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_heads_stored_in_8_bits_are_rounded_alike_on_two_ranks(pair, kv_cache_dtype):
    one, two = pair("gemma3_text", kv_cache_dtype=kv_cache_dtype)
    params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)]
    expected, _ = run(make_core(one), params)
    told, _ = run(make_core(two), params)
    for name, (delta,) in expected.items():
        for entry, other in zip(delta.prompt_logprobs, told[name][0].prompt_logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_on_one_gpu_give_the_tokens_of_one(pair, family):
    """Over gloo, which graphs cannot record: NCCL wants a GPU for each rank."""
    one, two = pair(family, device="cuda", enforce_eager=True)
    expected, _ = run(make_core(one), KINDS)
    told, _ = run(make_core(two), KINDS)
    assert tokens_of(told) == tokens_of(expected)
