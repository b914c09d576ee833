"""All rows at once, as a device samples them, beside row by row."""

from __future__ import annotations

from random import Random

import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.execution.batch_sampler import start_batch
from pagoda_runtime.execution.sampler import sample
from pagoda_runtime.execution.testing import Watch, make_row
from pagoda_runtime.sampling_params import SamplingParams

NUM_MIXED = 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [300, 2001, 8192])
def test_a_batch_chooses_what_row_by_row_is_chosen(vocab_size, dtype):
    random = Random(vocab_size)
    rows = [random_row(random, vocab_size) for _ in range(NUM_MIXED)]
    torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(NUM_MIXED, vocab_size)).to(dtype)
    found = start_batch(logits, rows, [0, 3]).tell()
    for output, expected in zip(found, sample(logits, rows, [0, 3]), strict=True):
        assert output.token_ids == expected.token_ids
        assert output.token_logprobs == (
            expected.token_logprobs and pytest.approx(expected.token_logprobs, abs=1e-5)
        )
        for token, other in zip(output.logprobs or [], expected.logprobs or [], strict=True):
            assert (token.token_id, token.rank) == (other.token_id, other.rank)
            assert [token_id for token_id, _ in token.top] == [i for i, _ in other.top]


def random_row(random, vocab_size):
    def some(number):
        return tuple(random.choices(range(vocab_size), k=number))

    def maybe(value, default):
        return value if random.random() < 0.3 else default

    params = SamplingParams(
        temperature=random.choice([0.0, 0.5, 1.0, 1.5]),
        top_k=maybe(random.choice([1, 5, 64, 250]), 0),
        top_p=maybe(random.choice([0.001, 0.1, 0.5, 0.9, 0.99]), 1.0),
        min_p=maybe(random.choice([0.01, 0.2]), 0.0),
        presence_penalty=maybe(0.5, 0.0),
        frequency_penalty=maybe(0.2, 0.0),
        repetition_penalty=maybe(1.2, 1.0),
        logit_bias=maybe(dict.fromkeys(some(3), 2.0), {}),
        allowed_token_ids=maybe(some(60), None),
        bad_words_token_ids=maybe((some(1), (7, 9)), ()),
        min_tokens=maybe(9, 0),
        logprobs=maybe(random.choice([0, 4]), None),
        best_of=maybe(3, None),
        grammar=maybe("", None),
    )
    words = -(-vocab_size // 32)
    few = sum(1 << token_id for token_id in {*some(9)})
    most = few ^ (1 << vocab_size) - 1
    mask = random.choice([few, most, random.getrandbits(vocab_size)]) | 1 << 7
    return make_row(
        params,
        seeds=[random.getrandbits(64) for _ in range(random.choice([1, 1, 1, 4]))],
        position=random.randrange(1, 5000),
        num_candidates=8 if random.random() < 0.1 else 0,
        history=[*some(30), 7],
        num_prompt_tokens=11,
        num_output_tokens=20,
        mask=None if params.grammar is None else mask.to_bytes(4 * words, "little"),
    )


def test_the_first_tokens_of_rows_are_where_the_logits_are():
    random = Random(1)
    rows = [random_row(random, 300) for _ in range(NUM_MIXED)]
    started = start_batch(3 * torch.randn(NUM_MIXED, 300), rows, [0])
    assert started.token_ids.dtype is torch.int64
    for token_id, row, output in zip(started.token_ids, rows, started.tell(), strict=True):
        assert int(token_id) in range(300)
        assert row.num_candidates or int(token_id) == output.token_ids[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_device_is_not_waited_for(seed):
    """Also: no tensors of two devices meet, and no shape depends on numbers."""
    random = Random(seed)
    rows = [random_row(random, 2001) for _ in range(NUM_MIXED)]
    with LaunchRecorder() as recorder, Watch() as watch:
        logits = torch.empty(len(rows), 2001, dtype=torch.bfloat16, device="cuda")
        started = start_batch(logits, rows, [0])
    assert started.token_ids.is_cuda
    assert started.token_ids.shape == (len(rows),)
    assert (watch.num_sent, watch.num_fetched) == (1, 1)
    assert len(recorder.launches) == 2


def test_a_batch_of_greedy_rows_costs_a_device_little():
    rows = [make_row(SamplingParams(temperature=0.0))] * 5
    with LaunchRecorder() as recorder, Watch() as watch:
        logits = torch.empty(5, 2001, device="cuda")
        start_batch(logits, rows, [0])
    assert (watch.num_sent, watch.num_fetched) == (1, 1)
    assert len(recorder.launches) == 2


def test_a_draw_that_needs_many_attempts_gets_them():
    torch.manual_seed(0)
    logits = torch.randn(1, 3000) / 4
    rows = [make_row(SamplingParams(top_p=0.002), seeds=range(30), position=3)]
    (expected,) = sample(logits, rows)
    assert start_batch(logits, rows, []).tell() == [expected]
