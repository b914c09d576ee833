from __future__ import annotations

import math
from random import Random

import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_kernels.sampling import Draw, draw_tokens, make_state, mix, pack_draws, uniform
from pagoda_kernels.sampling.reference import draw_tokens_reference


def draw(logits, draws):
    return draw_tokens(logits, torch.from_numpy(pack_draws(draws))).tolist()


def draws_of(count, **fields):
    return [Draw(0, state=make_state(seed, 7), **fields) for seed in range(count)]


@pytest.mark.parametrize("values", [(0, 0), (-3, 0), (0, 7), (2**62, 1)])
def test_uniform_numbers_are_even_over_each_of_their_arguments(values):
    first, second = values
    for numbers in (
        [uniform(make_state(seed, first), second) for seed in range(5000)],
        [uniform(make_state(first, position), abs(second)) for position in range(5000)],
        [uniform(make_state(first, abs(second)), attempt) for attempt in range(5000)],
    ):
        assert all(0.0 <= number < 1.0 for number in numbers)
        counts = torch.histc(torch.tensor(numbers), bins=10, min=0.0, max=1.0)
        assert counts.min() > 400
        assert counts.max() < 600


def test_numbers_are_those_of_splitmix64():
    """The first outputs of its reference implementation, seed 1234567."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_k": 2, "top_p": 0.5}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_draws_have_the_shares_that_their_limits_leave(fields, expected):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    drawn = draw(logits, draws_of(4000, **{"temperature": 1.0, **fields}))
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    wanted = 4000 * torch.tensor(expected)
    assert counts[wanted == 0].sum() == 0
    # Of a chi-square distribution with 3 degrees of freedom 1 in 1000 is above 16.3.
    assert ((counts - wanted).square() / wanted.clamp_min(1)).sum() < 16.3


def test_of_equal_logits_the_lower_tokens_are_larger():
    logits = torch.zeros(1, 50)
    assert draw(logits, [Draw(0)]) == [0]
    assert set(draw(logits, draws_of(300, temperature=1.0, top_k=3))) == {0, 1, 2}
    assert set(draw(logits, draws_of(300, temperature=1.0, top_p=0.06))) == {0, 1, 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_end_in_a_token(value):
    logits = torch.full((1, 50), value)
    limits = [{}, {"temperature": 1.0}, {"temperature": 1e-5, "top_k": 5, "top_p": 0.5}]
    for token in draw(logits, [draws_of(1, **some)[0] for some in limits]):
        assert token in range(50)


def test_tensors_that_do_not_fit_are_refused():
    logits, draws = torch.zeros(2, 8), torch.from_numpy(pack_draws([Draw(0), Draw(1)]))
    with pytest.raises(ValueError, match="rows contiguous"):
        draw_tokens(torch.zeros(8, 2).T, draws)
    with pytest.raises(ValueError, match="int64"):
        draw_tokens(logits, draws[:5])
    with pytest.raises(ValueError, match="contiguous, on the device"):
        draw_tokens(logits, draws.T.contiguous().T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 63, 32003, 151936, 262144])
def test_a_gpu_draws_the_tokens_of_the_reference(vocab_size, dtype):
    random = Random(vocab_size)
    torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(8, vocab_size)).to(dtype)
    draws = [
        Draw(
            random.randrange(8),
            random.choice([0, 2, 50, 5000]),
            make_state(random.getrandbits(64), random.randrange(5000)),
            random.choice([0.0, 0.5, 1.0, 2.0]),
            random.choice([0.0, 0.05]),
            random.choice([0.1, 0.9, 0.99, 1.0]),
        )
        for _ in range(100)
    ]
    packed = torch.from_numpy(pack_draws(draws))
    found = draw_tokens(logits.cuda(), packed.cuda()).cpu()
    # The rounding of a sum may fall on the other side of a border.
    assert (found != draw_tokens_reference(logits, packed)).sum() <= 1


def test_programs_of_all_multiprocessors_go_over_a_row():
    with LaunchRecorder() as recorder:
        draw_tokens(
            torch.empty(1, 262144, device="cuda", dtype=torch.bfloat16),
            torch.empty(6, 1, device="cuda", dtype=torch.int64),
        )
    maxima, drawn = recorder.launches
    assert math.prod(maxima.grid) == 128
    assert math.prod(drawn.grid) == 1
