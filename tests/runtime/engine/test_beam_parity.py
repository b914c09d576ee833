"""Beams and choices of the whole engine on tiny random checkpoints, against transformers."""

from __future__ import annotations

import random

import pytest
import torch

from pagoda_runtime import testing
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.engine.request import seed_of_choice
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest, RequestDelta
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams

BLOCK_SIZE = 8


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request, tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def runner(folder):
    return ModelRunner(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            num_threads=1,
            block_size=BLOCK_SIZE,
            max_model_len=256,
            kv_cache_memory_bytes=8 * 2**20,
        )
    )


@pytest.fixture(scope="module")
def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_core(runner: ModelRunner, eos_token_ids: list[int], num_blocks: int = 100) -> EngineCore:
    return testing.make_core(
        runner,
        num_blocks=num_blocks,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        long_prefill_token_threshold=16,
        eos_token_ids=eos_token_ids,
    )


def make_prompts(count: int, length: int = 13) -> list[list[int]]:
    random_ = random.Random(1)
    return [random_.choices(range(3, 300), k=length + i) for i in range(count)]


def run(
    core: EngineCore, prompts: list[list[int]], params: SamplingParams
) -> list[list[RequestDelta]]:
    """The deltas of each prompt, all in one batch."""
    for i, prompt in enumerate(prompts):
        core.add(
            EngineRequest(
                request_id=str(i),
                prompt_token_ids=prompt,
                sampling_params=params,
                arrival_seconds=0.0,
            )
        )
    deltas: list[list[RequestDelta]] = [[] for _ in prompts]
    while core.has_work:
        for delta in core.step(0.0).deltas:
            deltas[int(delta.request_id)].append(delta)
        core.check()
    return deltas


def transformers_beams(
    model, prompt: list[int], eos: list[int], params: SamplingParams
) -> list[tuple[list[int], float]]:
    """Outputs without padding, and scores, best first."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        max_new_tokens=params.max_tokens,
        do_sample=False,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=eos or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    rows = out.sequences[:, len(prompt) :].tolist()
    for row, score in zip(rows, out.sequences_scores.tolist(), strict=True):
        ends = [i for i, token_id in enumerate(row) if token_id in eos]
        found.append((row[: ends[0] + 1] if ends else row, score))
    return found


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"), [(1.0, False), (0.0, True), (2.0, "never"), (-1.0, False)]
)
def test_beams_are_those_of_transformers(
    runner, transformers_model, num_beams, length_penalty, early_stopping
):
    # So many end tokens that hypotheses end at different lengths.
    eos = list(range(5, 45))
    params = SamplingParams(
        n=num_beams,
        use_beam_search=True,
        temperature=0.0,
        max_tokens=12,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    prompts = make_prompts(3)
    lengths = set()
    for prompt, deltas in zip(prompts, run(make_core(runner, eos), prompts, params), strict=True):
        expected = transformers_beams(transformers_model, prompt, eos, params)
        assert [delta.index for delta in deltas] == list(range(num_beams))
        assert [delta.new_token_ids for delta in deltas] == [ids for ids, _ in expected]
        for delta, (ids, score) in zip(deltas, expected, strict=True):
            assert delta.cumulative_logprob / len(ids) ** length_penalty == pytest.approx(
                score, rel=1e-4
            )
        assert [delta.is_last for delta in deltas] == [False] * (num_beams - 1) + [True]
        lengths |= {len(ids) for ids, _ in expected}
    if abs(length_penalty) <= 1.0:
        assert len(lengths) > 1, "no test of beams that end early"


def test_beams_that_were_preempted_are_still_those_of_transformers(runner, transformers_model):
    params = SamplingParams(n=3, use_beam_search=True, temperature=0.0, max_tokens=30)
    prompts = make_prompts(3, length=20)
    core = make_core(runner, [], num_blocks=20)
    found = run(core, prompts, params)
    assert core.scheduler.preemptions_total > 0
    for prompt, deltas in zip(prompts, found, strict=True):
        expected = transformers_beams(transformers_model, prompt, [], params)
        assert [delta.new_token_ids for delta in deltas] == [ids for ids, _ in expected]


def test_every_choice_is_what_its_seed_gives_alone(runner):
    prompt = make_prompts(1)[0]
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=10, ignore_eos=True)
    choices: dict[int, list[int]] = {}
    for delta in run(make_core(runner, []), [prompt], params)[0]:
        choices.setdefault(delta.index, []).extend(delta.new_token_ids)
    assert len({tuple(tokens) for tokens in choices.values()}) == 4
    for index, tokens in choices.items():
        alone = SamplingParams(
            temperature=1.0, seed=seed_of_choice(7, index), max_tokens=10, ignore_eos=True
        )
        deltas = run(make_core(runner, []), [prompt], alone)[0]
        assert [token for delta in deltas for token in delta.new_token_ids] == tokens
