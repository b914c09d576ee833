from __future__ import annotations

import pytest
import torch

from pagoda_runtime.execution.sampler import SampleRow, sample, uniform
from pagoda_runtime.sampling_params import SamplingParams

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])


def draws(logits, num_draws=2500, **params):
    """Share of each token among draws at successive positions."""
    rows = [SampleRow(SamplingParams(**params), 5, position) for position in range(num_draws)]
    token_ids = sample(logits.expand(num_draws, -1), rows)
    return torch.bincount(torch.tensor(token_ids), minlength=logits.shape[-1]) / num_draws


@pytest.mark.parametrize("vocab_size", [7, 1024, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(vocab_size, dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size).to(dtype)
    logits[1, [vocab_size // 2, vocab_size - 1]] = 50.0
    rows = [SampleRow(SamplingParams(temperature=0.0), 0, 0)] * 3
    assert sample(logits, rows) == logits.float().argmax(-1).tolist()
    assert sample(logits, rows)[1] == vocab_size // 2


def test_draws_follow_the_distribution():
    for temperature in (1.0, 0.5):
        expected = (LOGITS[0] / temperature).softmax(-1)
        shares = draws(LOGITS, temperature=temperature)
        torch.testing.assert_close(shares, expected, atol=0.025, rtol=0)


def test_top_k_leaves_k_tokens_in_proportion():
    expected = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf, -torch.inf]).softmax(-1)
    torch.testing.assert_close(draws(LOGITS, top_k=2), expected, atol=0.025, rtol=0)


def test_top_p_keeps_the_token_that_crosses_it():
    # Probabilities: 0.56, 0.21, 0.13, 0.08, 0.03.
    assert draws(LOGITS, top_p=0.5, num_draws=200).nonzero().flatten().tolist() == [0]
    assert draws(LOGITS, top_p=0.6, num_draws=200).nonzero().flatten().tolist() == [0, 2]


def test_top_p_looks_beyond_the_first_candidates_when_it_must():
    flat = torch.zeros(1, 5000)
    flat[0, :2500] = 1e-3
    rows = [SampleRow(SamplingParams(top_p=0.9), 1, position) for position in range(200)]
    token_ids = sample(flat.expand(200, -1), rows)
    assert len({token_id // 500 for token_id in token_ids}) >= 8


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    assert draws(logits, num_draws=500)[[1, 3]].tolist() == [0.0, 0.0]


def test_a_draw_depends_on_seed_and_position_alone():
    torch.manual_seed(0)
    logits = torch.randn(4, 100)
    rows = [SampleRow(SamplingParams(), seed, seed + 3) for seed in range(4)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(4)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_greedy_and_random_rows_mix():
    logits = LOGITS.expand(3, -1)
    rows = [
        SampleRow(SamplingParams(), 1, 1),
        SampleRow(SamplingParams(temperature=0.0), 1, 1),
        SampleRow(SamplingParams(), 1, 1),
    ]
    token_ids = sample(logits, rows)
    assert token_ids[1] == 0
    assert token_ids[0] == token_ids[2] == sample(LOGITS, rows[:1])[0]


def test_uniform_numbers_are_even_over_positions_and_over_seeds():
    for numbers in (
        [uniform(-3, position) for position in range(5000)],
        [uniform(seed, 7) for seed in range(5000)],
    ):
        assert all(0.0 <= number < 1.0 for number in numbers)
        counts = torch.histc(torch.tensor(numbers), bins=10, min=0.0, max=1.0)
        assert counts.min() > 400
        assert counts.max() < 600


def test_top_p_cuts_a_large_vocabulary_where_a_sort_would():
    torch.manual_seed(0)
    logits = torch.randn(1, 20_000)
    sorted_ids = logits[0].argsort(descending=True)
    reached = logits[0, sorted_ids].softmax(-1).cumsum(-1, dtype=torch.float64) >= 0.7
    kept = set(sorted_ids[: int(reached.int().argmax()) + 1].tolist())
    assert len(kept) > 1024
    rows = [SampleRow(SamplingParams(top_p=0.7), 1, position) for position in range(300)]
    assert set(sample(logits.expand(300, -1), rows)) <= kept


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9999}])
def test_draws_of_a_large_vocabulary_follow_the_distribution(params):
    torch.manual_seed(0)
    # 16 groups of 512 tokens; each group has one weight, so that its share can be counted.
    group_logits = torch.linspace(-1.0, 1.0, 16)
    logits = group_logits.repeat_interleave(512)[None]
    shares = draws(logits, num_draws=600, **params).view(16, 512).sum(-1)
    torch.testing.assert_close(shares, group_logits.softmax(-1), atol=0.05, rtol=0)
