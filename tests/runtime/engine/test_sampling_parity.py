"""Processed logits and logprobs of the whole engine on a tiny checkpoint, against transformers."""

from __future__ import annotations

import random

import pytest
import torch

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest, RequestDelta
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import make_core

PROMPT = random.Random(1).choices(range(3, 300), k=13)
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def runner(folder):
    return ModelRunner(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            num_threads=1,
            block_size=8,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 20,
        )
    )


@pytest.fixture(scope="module")
def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(runner: ModelRunner, params: SamplingParams) -> list[RequestDelta]:
    core = make_core(
        runner,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        long_prefill_token_threshold=8,
    )
    core.add(
        EngineRequest(
            request_id="r", prompt_token_ids=PROMPT, sampling_params=params, arrival_seconds=0.0
        )
    )
    deltas = []
    while core.has_work:
        deltas += core.step(0.0).deltas
    return deltas


def greedy(runner: ModelRunner, **params: object) -> list[int]:
    fields = {"temperature": 0.0, "max_tokens": MAX_TOKENS, **params}
    deltas = run(runner, SamplingParams(**fields))
    return [token_id for delta in deltas for token_id in delta.new_token_ids]


def generate(model, **options: object) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        pad_token_id=0,
        **options,
    )
    return out[0, len(PROMPT) :].tolist()


def test_processed_logits_give_the_tokens_of_transformers(runner, transformers_model):
    plain = generate(transformers_model)
    assert greedy(runner) == plain
    first, second = plain[0], plain[1]
    words = [[first], [plain[2], plain[3]], [9, 9]]
    for params, options in (
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"logit_bias": {second: -90.0, 7: 0.1}},
            {"sequence_bias": [[[second], -90.0], [[7], 0.1]]},
        ),
        ({"bad_words_token_ids": tuple(map(tuple, words))}, {"bad_words_ids": words}),
        (
            {"repetition_penalty": 1.2, "bad_words_token_ids": tuple(map(tuple, words))},
            {"repetition_penalty": 1.2, "bad_words_ids": words},
        ),
    ):
        expected = generate(transformers_model, **options)
        assert expected != plain
        assert greedy(runner, **params) == expected


def test_min_tokens_holds_back_the_end_as_transformers_does(runner, transformers_model):
    stop = generate(transformers_model)[1]
    expected = generate(transformers_model, min_new_tokens=5, eos_token_id=[2, stop])
    assert len(greedy(runner, stop_token_ids=(stop,))) == 2
    assert greedy(runner, stop_token_ids=(stop,), min_tokens=5) == expected


def test_logprobs_are_those_of_the_whole_sequence(runner, transformers_model):
    params = SamplingParams(
        temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2, logit_bias={50: 90.0}
    )
    deltas = run(runner, params)
    tokens = [token for delta in deltas for token in delta.logprobs or []]
    prompt = [token for delta in deltas for token in delta.prompt_logprobs or []]
    assert [token.token_id for token in prompt] == PROMPT[1:]
    assert [token.token_id for token in tokens] == [50] * 5
    with torch.inference_mode():
        logits = transformers_model(torch.tensor([PROMPT + [50] * 5])).logits[0]
    for row, token, num_top in zip(
        logits.log_softmax(-1), prompt + tokens, [2] * 12 + [3] * 5, strict=False
    ):
        top = row.topk(num_top)
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in token.top] == top.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert token.rank == 1 + int((row > row[token.token_id]).sum())
