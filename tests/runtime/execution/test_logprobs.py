from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda_runtime.execution.logprobs import (
    compute_logprobs,
    describe_tokens,
    find_candidates,
    likeliest,
    token_logprobs,
)

INF = math.inf


@settings(deadline=None)
@given(
    # Few values, so that many are equal.
    values=st.lists(st.integers(-3, 3).map(float) | st.just(-INF), min_size=1, max_size=700),
    num_wanted=st.integers(0, 800),
)
def test_the_likeliest_are_those_of_a_stable_sort(values, num_wanted):
    found, indices = likeliest(torch.tensor(values), num_wanted)
    expected = sorted((-v, i) for i, v in enumerate(values) if v > -INF)[:num_wanted]
    assert list(zip((-found).tolist(), indices.tolist(), strict=True)) == expected


@pytest.mark.parametrize("num_wanted", [1, 20, 2000, 32_000])
def test_the_likeliest_of_a_vocabulary_are_those_of_a_sort(num_wanted):
    torch.manual_seed(0)
    logits = torch.randn(32_000).bfloat16().float()
    values, indices = likeliest(logits, num_wanted)
    expected = logits.sort(descending=True, stable=True)
    assert torch.equal(values, expected.values[:num_wanted])
    assert torch.equal(indices, expected.indices[:num_wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_a_log_softmax(dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, 1000).to(dtype)
    expected = logits.float().log_softmax(-1)
    for row, token in enumerate(compute_logprobs(logits, [5, 6, 7], num_top=4)):
        assert token.token_id == 5 + row
        assert token.logprob == pytest.approx(float(expected[row, 5 + row]), abs=1e-6)
        assert token.rank == 1 + int((logits[row] > logits[row, 5 + row]).sum())
        order = logits[row].sort(descending=True, stable=True).indices[:4].tolist()
        assert [token_id for token_id, _ in token.top] == order
        assert [p for _, p in token.top] == pytest.approx(expected[row, order].tolist(), abs=1e-6)


def test_a_token_among_the_likeliest_has_its_place_as_rank():
    tokens = describe_tokens(torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0]), [1, 4, 0], num_top=3)
    assert [token.rank for token in tokens] == [1, 3, 5]
    assert [token_id for token_id, _ in tokens[0].top] == [1, 3, 2]


def test_without_top_there_are_logprob_and_rank_alone():
    (token,) = describe_tokens(torch.tensor([0.0, math.log(3.0)]), [0], num_top=0)
    assert (token.rank, token.top) == (2, [])
    assert token.logprob == pytest.approx(math.log(0.25))


def test_logprobs_do_not_depend_on_the_rows_beside():
    torch.manual_seed(0)
    logits = torch.randn(5, 777).bfloat16()
    together = compute_logprobs(logits, [9] * 5, num_top=3)
    assert together == [compute_logprobs(row[None].clone(), [9], num_top=3)[0] for row in logits]
    assert [token_logprobs(row, [9]) for row in logits] == [[t.logprob] for t in together]


def test_candidates_of_a_beam_are_the_likeliest_with_their_logprobs():
    logits = torch.tensor([1.0, 2.0, -INF, 2.0, 0.0])
    candidates = find_candidates(logits, 3)
    assert candidates.token_ids == [1, 3, 0]
    assert candidates.token_logprobs == pytest.approx(logits.log_softmax(-1)[[1, 3, 0]].tolist())


def test_a_beam_has_no_candidates_that_must_not_come():
    assert find_candidates(torch.tensor([-INF, 2.0, -INF, 2.0]), 4).token_ids == [1, 3]
