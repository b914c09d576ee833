from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagoda_runtime.execution import sampler
from pagoda_runtime.execution.batch_sampler import start_batch
from pagoda_runtime.execution.testing import make_row
from pagoda_runtime.sampling_params import SamplingParams

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module", autouse=True, params=["row_by_row", "in_batch"])
def in_batch(request):
    """Every test is one of both ways."""
    sample.in_batch = request.param == "in_batch"


def sample(logits, rows, eos_token_ids=()):
    if sample.in_batch:
        return start_batch(logits, rows, eos_token_ids).tell()
    return sampler.sample(logits, rows, eos_token_ids)


def draw(logits, params, num_draws, position=7):
    """Tokens drawn with the seeds 0, 1, …"""
    (output,) = sample(logits, [make_row(params, seeds=range(num_draws), position=position)])
    return output.token_ids


def shares(logits, *, num_draws=2500, **params):
    """Share of each token among draws."""
    token_ids = torch.tensor(draw(logits, SamplingParams(**params), num_draws))
    return torch.bincount(token_ids, minlength=logits.shape[-1]) / num_draws


def plain_distribution(logits, params):
    """Probability of each token that may be drawn: sort, then cut by min_p, top-k and top-p."""
    weights = (torch.tensor(logits, dtype=torch.float64) / params.temperature).softmax(-1).tolist()
    order = sorted(range(len(weights)), key=lambda token_id: (-weights[token_id], token_id))
    least = params.min_p * max(weights)
    order = [token_id for token_id in order if weights[token_id] >= least]
    if params.top_k > 0:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[token_id] for token_id in order), 0.0, []
    for token_id in order:
        kept.append(token_id)
        mass += weights[token_id]
        if mass >= params.top_p * total:
            break
    return {token_id: weights[token_id] / mass for token_id in kept}


@pytest.mark.parametrize("vocab_size", [7, 1024, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(vocab_size, dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size).to(dtype)
    logits[1, [vocab_size // 2, vocab_size - 1]] = 50.0
    outputs = sample(logits, [make_row(GREEDY)] * 3)
    assert [output.token_ids for output in outputs] == [[i] for i in logits.float().argmax(-1)]
    assert outputs[1].token_ids == [vocab_size // 2]


@given(
    # Quarters, so that no sum of probabilities but 1 is a boundary, and equal logits occur.
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=12),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.integers(-1, 14).filter(lambda top_k: top_k != 1),
        top_p=st.sampled_from([0.137, 0.5013, 0.8111, 0.9777, 1.0]),
        min_p=st.sampled_from([0.0, 0.0613, 0.333, 1.0]),
    ),
)
def test_draws_follow_the_distribution_that_a_sort_would_give(logits, params):
    expected = plain_distribution(logits, params)
    drawn = draw(torch.tensor([logits]), params, 150)
    assert set(drawn) <= set(expected)
    for token_id, probability in expected.items():
        # Five standard deviations.
        tolerance = 5 * math.sqrt(probability * (1 - probability) / len(drawn)) + 1e-9
        assert drawn.count(token_id) / len(drawn) == pytest.approx(probability, abs=tolerance)


def test_temperature_sharpens_the_distribution():
    for temperature in (1.0, 0.5):
        expected = (LOGITS[0] / temperature).softmax(-1)
        found = shares(LOGITS, temperature=temperature)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_token_that_crosses_it():
    # Probabilities: 0.56, 0.21, 0.13, 0.08, 0.03.
    assert shares(LOGITS, top_p=0.5, num_draws=200).nonzero().flatten().tolist() == [0]
    assert shares(LOGITS, top_p=0.6, num_draws=200).nonzero().flatten().tolist() == [0, 2]


def test_of_equal_tokens_the_first_ones_are_kept():
    flat = torch.zeros(1, 2000)
    assert max(draw(flat, SamplingParams(top_p=0.25), 500)) in range(450, 500)
    assert max(draw(flat, SamplingParams(top_k=5), 100)) == 4


def test_min_p_keeps_tokens_by_their_share_of_the_likeliest():
    # Shares: 1, 0.22, 0.37, 0.05, 0.14.
    assert shares(LOGITS, min_p=0.2, num_draws=200).nonzero().flatten().tolist() == [0, 1, 2]
    assert shares(LOGITS, min_p=1.0, num_draws=50).nonzero().flatten().tolist() == [0]


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for params in ({}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 0.1}):
        assert set(draw(logits, SamplingParams(**params), 300)) == {1, 3}


def test_top_p_cuts_a_large_vocabulary_where_a_sort_would():
    torch.manual_seed(0)
    logits = torch.randn(1, 20_000)
    kept = plain_distribution(logits[0].tolist(), SamplingParams(top_p=0.7))
    assert len(kept) > 1024
    drawn = draw(logits, SamplingParams(top_p=0.7), 300)
    assert set(drawn) <= set(kept)
    assert len(set(drawn)) > 250


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9999}, {"top_k": 8000}, {"min_p": 0.01}])
def test_draws_of_a_large_vocabulary_follow_the_distribution(params):
    # 16 groups of 500 tokens; each group has one weight, so that its share can be counted.
    group_logits = torch.linspace(-1.0, 1.0, 16)
    logits = group_logits.repeat_interleave(500)[None]
    found = shares(logits, num_draws=600, **params).view(16, 500).sum(-1)
    torch.testing.assert_close(found, group_logits.softmax(-1), atol=0.05, rtol=0)


def test_processed_logits_are_what_is_chosen_from():
    params = {"logit_bias": {3: 9.0}, "allowed_token_ids": (3, 4)}
    rows = [
        make_row(SamplingParams(temperature=0.0)),
        make_row(SamplingParams(temperature=0.0, **params)),
        make_row(SamplingParams(**params)),
        make_row(SamplingParams(**params, min_tokens=1), num_output_tokens=0),
    ]
    outputs = sample(LOGITS.expand(4, -1), rows, eos_token_ids=[3])
    assert [output.token_ids for output in outputs] == [[0], [3], [3], [4]]


def test_penalties_choose_among_what_was_not_said():
    params = SamplingParams(temperature=0.0, presence_penalty=1.5)
    row = make_row(params, history=[2, 0], num_prompt_tokens=1, num_output_tokens=1)
    assert sample(LOGITS, [row])[0].token_ids == [2]


def test_logprobs_are_of_the_unprocessed_logits():
    params = SamplingParams(logprobs=2, temperature=0.1, logit_bias={3: 90.0})
    (output,) = sample(LOGITS, [make_row(params, seeds=[1, 2])])
    logprobs = LOGITS[0].log_softmax(-1).tolist()
    assert output.token_ids == [3, 3]
    assert output.logprobs is not None
    for token in output.logprobs:
        assert (token.token_id, token.rank) == (3, 5)
        assert token.logprob == pytest.approx(logprobs[3])
        assert [token_id for token_id, _ in token.top] == [0, 2]
    assert output.token_logprobs == [token.logprob for token in output.logprobs]


def test_best_of_has_the_logprob_of_each_token_and_no_more():
    params = SamplingParams(n=1, best_of=3)
    (output,) = sample(LOGITS, [make_row(params, seeds=[1, 2, 3])])
    logprobs = LOGITS[0].log_softmax(-1)
    assert output.logprobs is None
    assert output.token_logprobs == pytest.approx(logprobs[output.token_ids].tolist())
    assert sample(LOGITS, [make_row(SamplingParams())])[0].token_logprobs is None


def test_a_beam_gets_candidates_in_place_of_draws():
    params = SamplingParams(temperature=0.0, n=2, use_beam_search=True, logit_bias={3: 9.0})
    (output,) = sample(LOGITS, [make_row(params, num_candidates=4)])
    assert output.token_ids == [3, 0, 2, 1]
    biased = LOGITS[0] + torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0])
    assert output.token_logprobs == pytest.approx(biased.log_softmax(-1)[[3, 0, 2, 1]].tolist())


def test_seeds_of_one_row_draw_as_rows_of_their_own():
    torch.manual_seed(0)
    logits = torch.randn(1, 3000)
    params = SamplingParams(top_p=0.9)
    alone = [sample(logits, [make_row(params, seeds=[seed])])[0].token_ids[0] for seed in range(9)]
    assert draw(logits, params, 9, position=1) == alone
    assert len(set(alone)) > 5


EVERY_KIND = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 2000},
    {"min_p": 0.05, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 0},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5, "top_p": 0.99},
    {"bad_words_token_ids": ((3, 5), (6,)), "logit_bias": {8: 2.0}, "best_of": 2},
    {"allowed_token_ids": tuple(range(0, 2000, 3)), "min_tokens": 9},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [2001, 4096])
def test_what_is_beside_a_row_changes_nothing(vocab_size, dtype):
    torch.manual_seed(0)
    logits = torch.randn(len(EVERY_KIND), vocab_size).to(dtype)
    rows = [
        make_row(
            SamplingParams(**params),
            seeds=[index, -index - 1],
            position=4 + index,
            history=[1, 2, 3, 3],
            num_prompt_tokens=2,
            num_output_tokens=2,
        )
        for index, params in enumerate(EVERY_KIND)
    ]
    eos = [0, 3]
    together = sample(logits, rows, eos)
    assert together == sample(logits.flip(0), rows[::-1], eos)[::-1]
    for index, row in enumerate(rows):
        assert sample(logits[index][None].clone(), [row], eos) == [together[index]]


def test_greedy_and_random_rows_mix():
    rows = [make_row(SamplingParams()), make_row(GREEDY), make_row(SamplingParams())]
    outputs = sample(LOGITS.expand(3, -1), rows)
    assert outputs[1].token_ids == [0]
    assert outputs[0] == outputs[2] == sample(LOGITS, rows[:1])[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_out_of_range_end_no_step(value):
    kinds = [*EVERY_KIND, {"top_k": 5, "min_p": 0.5, "top_p": 0.5}]
    logits = torch.full((len(kinds), 2001), value)
    rows = [
        make_row(SamplingParams(**params), history=[0], num_prompt_tokens=1) for params in kinds
    ]
    for output in sample(logits, rows):
        assert output.token_ids[0] in range(2001)


def test_the_smallest_values_in_range_leave_the_likeliest():
    tiny = math.ulp(0.0)
    for params in (
        {"top_p": tiny},
        {"top_p": tiny, "min_p": 1.0, "temperature": 2.0},
        {"top_p": tiny, "top_k": 3},
        {"temperature": 1e-5},
        {"temperature": 1e-5, "min_p": tiny, "top_p": 0.5},
    ):
        assert set(draw(LOGITS, SamplingParams(**params), 20)) == {0}


class TiedModel:
    """Its rounded logits are equal at three tokens; unrounded, the second of them is the largest,
    and at another row, rounded, even one is larger.
    """

    def argmax(self, hidden):
        return hidden[:, 1].long()

    def logits(self, hidden):
        logits = torch.randn(len(hidden), 600).bfloat16()
        logits[:, [7, 70, 300]] = 17.0
        logits[hidden[:, 0] == 1, 300] = 17.125
        return logits


def test_greedy_tokens_are_the_same_whatever_logprobs_are_asked_for():
    asked = [{}, {"logprobs": 0}, {"logprobs": 4}, {"best_of": 2}, {"temperature": 1.0, "top_p": 1}]
    rows = [make_row(SamplingParams(**{"temperature": 0.0, **params})) for params in asked] * 2
    hidden = torch.tensor([[0.0, 70.0]] * len(asked) + [[1.0, 70.0]] * len(asked))
    outputs = sampler.sample_hidden(TiedModel(), hidden, rows, [])
    for output, row in zip(outputs, rows, strict=True):
        if row.sampling_params.is_greedy:
            assert output.token_ids == [70]
        for token in output.logprobs or []:
            assert (token.token_id, token.rank) == (70, 1)
            assert token.top == sorted(token.top, key=lambda other: -other[1])
            assert {i for i, _ in token.top[:1]} <= {70}


@pytest.mark.gpu
def test_a_gpu_chooses_what_a_cpu_chooses():
    torch.manual_seed(0)
    # Far apart, so that no rounding moves a token over a border.
    logits = torch.stack([torch.randperm(2001) for _ in EVERY_KIND]).float() / 100
    rows = [
        make_row(SamplingParams(**params), history=[1, 2, 3, 3], num_prompt_tokens=2)
        for params in EVERY_KIND
    ]
    rows.append(make_row(SamplingParams(use_beam_search=True), num_candidates=9))
    logits = torch.cat([logits, logits[:1]])
    found = start_batch(logits.cuda(), rows, []).tell()
    for output, expected in zip(found, sampler.sample(logits, rows), strict=True):
        assert output.token_ids == expected.token_ids
        assert output.token_logprobs == (
            expected.token_logprobs and pytest.approx(expected.token_logprobs, abs=1e-5)
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"top_p": 0.7, "logprobs": 3},
        {"top_k": 4, "min_p": 0.01},
        {"min_tokens": 5, "allowed_token_ids": (3, 64, 65, 300)},
    ],
)
@pytest.mark.parametrize("are_allowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_few_tokens_are_allowed_or_forbidden_others_are_drawn_as_ever(
    fields, dtype, are_allowed
):
    torch.manual_seed(1)
    logits = torch.randn(1, 1000).to(dtype)
    few = sum(1 << i for i in (0, 3, 9, 64, 65, 300, 999))
    mask = (few if are_allowed else few ^ (1 << 1000) - 1).to_bytes(128, "little")

    def draw_masked(**others):
        params = SamplingParams(grammar="", **fields, **others)
        return sample(logits, [make_row(params, seeds=range(40), mask=mask)], [3])

    # A bias, be it 0, has all tokens looked at.
    assert draw_masked() == draw_masked(logit_bias={5: 0.0})
