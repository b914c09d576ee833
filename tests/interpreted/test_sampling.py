from __future__ import annotations

import math
from random import Random

import pytest
import torch

from pagoda_kernels.sampling import Draw, draw_tokens, make_state, pack_draws
from pagoda_kernels.sampling.reference import draw_tokens_reference
from pagoda_runtime.execution.batch_sampler import start_batch
from pagoda_runtime.execution.sampler import sample
from pagoda_runtime.execution.testing import make_row
from pagoda_runtime.sampling_params import SamplingParams


def check(logits, draws):
    """The tokens, after a look whether they are those of the reference."""
    packed = torch.from_numpy(pack_draws(draws))
    tokens = draw_tokens(logits, packed)
    assert tokens.tolist() == draw_tokens_reference(logits, packed).tolist()
    return tokens.tolist()


def random_draw(random, num_rows, vocab_size):
    return Draw(
        random.randrange(num_rows),
        top_k=random.choice([0, -1, 1, 2, 7, vocab_size - 1, vocab_size]),
        state=make_state(random.getrandbits(64), random.randrange(5000)),
        temperature=random.choice([0.0, 1e-5, 0.5, 1.0, 2.0]),
        min_p=random.choice([0.0, 0.0, 0.05, 1.0]),
        top_p=random.choice([5e-324, 0.1, 0.5, 0.9, 1.0]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 32003])
def test_tokens_are_those_of_the_reference(vocab_size, dtype):
    random = Random(vocab_size)
    torch.manual_seed(vocab_size)
    # Rows of a larger tensor, as those of a padded vocabulary are.
    logits = (3 * torch.randn(3, vocab_size + 13)).to(dtype)[:, :vocab_size]
    check(logits, [random_draw(random, 3, vocab_size) for _ in range(12)])


def test_any_number_of_the_largest_is_found_among_few_values_and_many():
    torch.manual_seed(0)
    few, many = torch.randint(-3, 3, (1000,)).float(), torch.randn(1000)
    clustered = torch.cat([torch.linspace(5, 6, 300), torch.randn(700)])
    logits = torch.stack([few, few * -0.0, many, clustered])
    limits = [(0, 3), (0, 170), (1, 20), (2, 9), (2, 640), (3, 5), (3, 200)]
    check(logits, [Draw(row, k, make_state(k, 0), temperature=2.0) for row, k in limits])


def test_several_tiles_are_one_row():
    """Equal logits all over the row, so that borders lie in every tile."""
    logits = torch.zeros(1, 40000)
    limits = [{"top_k": 20000}, {"top_p": 0.9}, {}, {"top_k": 35000, "top_p": 0.99}]
    tokens = check(
        logits,
        [
            Draw(0, state=make_state(seed, 3), temperature=1.0, **some)
            for some in limits
            for seed in range(2)
        ],
    )
    assert max(tokens[:2]) < 20000


def test_numbers_that_are_none_end_in_a_token_of_the_row():
    inf = math.inf
    logits = torch.zeros(4, 50)
    logits[0], logits[1], logits[2, ::2] = math.nan, -inf, -inf
    logits[3, 7], logits[3, 9], logits[3, 11] = inf, math.nan, -inf
    draws = [
        Draw(row, top_k, make_state(row, 1), temperature, top_p=0.9)
        for row in range(4)
        for top_k, temperature in ((0, 0.0), (0, 1.0), (30, 1e-5))
    ]
    tokens = check(logits, draws)
    assert all(token in range(50) for token in tokens)
    assert all(token % 2 for token in tokens[6:9])
    assert tokens[9:] == [7, 7, 7]


def test_a_step_gives_the_tokens_that_a_cpu_draws_row_by_row():
    random = Random(0)
    torch.manual_seed(0)
    params = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.0, frequency_penalty=2.0),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, logprobs=0),
        SamplingParams(top_p=0.95, min_p=0.05, repetition_penalty=1.3),
        SamplingParams(top_p=0.5, allowed_token_ids=(4, 9, 300), logit_bias={9: 3.0}),
        SamplingParams(top_p=1.0, bad_words_token_ids=((7,),), min_tokens=50),
    ]
    rows = [
        make_row(
            some,
            seeds=[random.getrandbits(64)],
            position=random.randrange(1, 5000),
            history=random.choices(range(601), k=30),
            num_prompt_tokens=11,
            num_output_tokens=19,
        )
        for some in params
    ]
    rows.append(make_row(SamplingParams(use_beam_search=True, n=2), num_candidates=4))
    logits = 3 * torch.randn(len(rows), 601)
    found = start_batch(logits, rows, [0]).tell()
    expected = sample(logits, rows, [0])
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]


def test_draws_have_the_shares_of_the_weights():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    draws = [Draw(0, state=make_state(seed, 5), temperature=1.0, top_p=0.8) for seed in range(60)]
    counts = torch.bincount(torch.tensor(check(logits, draws)), minlength=4)
    wanted = 60 * torch.tensor([0.5, 0.25, 0.15]) / 0.9
    assert counts[3] == 0
    # Of a chi-square distribution with 2 degrees of freedom 1 in 1000 is above 13.8.
    assert ((counts[:3] - wanted).square() / wanted).sum() < 13.8
