from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagoda_runtime.execution.logprobs import (
    ToHost,
    describe_tokens,
    find_candidates,
    start_logprobs,
    tell_tokens,
    top_k,
)

INF = math.inf


def describe(logits, token_ids, num_top, *, in_batch=False):
    return start_logprobs(logits, token_ids, num_top, in_batch=in_batch)()


@given(
    # Few values, so that many are equal.
    values=st.lists(st.integers(-3, 3).map(float) | st.just(-INF), min_size=1, max_size=700),
    num_wanted=st.integers(0, 800),
)
def test_the_largest_are_those_of_a_stable_sort(values, num_wanted):
    num_wanted = min(num_wanted, len(values))
    # The zeros of the second row are negative ones.
    rows = torch.tensor([values, values])
    rows[1] *= torch.tensor(-1.0).where(rows[1] == 0.0, 1.0)
    found, indices = top_k(rows, num_wanted)
    expected = sorted((-v, i) for i, v in enumerate(values))[:num_wanted]
    for row in range(2):
        in_order = list(zip((-found[row]).tolist(), indices[row].tolist(), strict=True))
        assert in_order == expected


@pytest.mark.parametrize("num_wanted", [1, 20, 2000, 32_000])
def test_the_largest_of_a_vocabulary_are_those_of_a_sort(num_wanted):
    torch.manual_seed(0)
    logits = torch.randn(2, 32_000).bfloat16().float()
    values, indices = top_k(logits, num_wanted)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :num_wanted])
    assert torch.equal(indices, expected.indices[:, :num_wanted])


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_a_log_softmax(dtype, in_batch):
    torch.manual_seed(0)
    logits = torch.randn(3, 1000).to(dtype)
    expected = logits.float().log_softmax(-1)
    for row, token in enumerate(describe(logits, [5, 6, 7], 4, in_batch=in_batch)):
        assert token.token_id == 5 + row
        assert token.logprob == pytest.approx(float(expected[row, 5 + row]), abs=1e-6)
        assert token.rank == 1 + int((logits[row] > logits[row, 5 + row]).sum())
        order = logits[row].sort(descending=True, stable=True).indices[:4].tolist()
        assert [token_id for token_id, _ in token.top] == order
        assert [p for _, p in token.top] == pytest.approx(expected[row, order].tolist(), abs=1e-6)


def test_a_token_among_the_likeliest_has_its_place_as_rank():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0])
    tokens = describe(logits.expand(3, -1), [1, 4, 0], 3)
    assert [token.rank for token in tokens] == [1, 3, 5]
    assert [token_id for token_id, _ in tokens[0].top] == [1, 3, 2]


def test_without_top_there_are_logprob_and_rank_alone():
    (token,) = describe(torch.tensor([[0.0, math.log(3.0)]]), [0], 0)
    assert (token.rank, token.top) == (2, [])
    assert token.logprob == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("in_batch", [False, True])
def test_logprobs_do_not_depend_on_the_rows_beside(in_batch):
    torch.manual_seed(0)
    logits = torch.randn(5, 777).bfloat16()
    together = describe(logits, [9] * 5, 3, in_batch=in_batch)
    assert together == [describe(row[None].clone(), [9], 3)[0] for row in logits]


def test_a_token_known_to_be_the_largest_is_the_first_of_all():
    # Rounded, another one is as large as the third token, and the last one is larger.
    logits = torch.tensor([[1.0, 17.0, 17.0, 2.0, 17.125]], dtype=torch.bfloat16)
    described = ToHost([describe_tokens(logits, torch.tensor([2]), 3, is_argmax=True)]).wait()[0]
    (token,) = tell_tokens([2], *described, num_top=3)
    assert token.rank == 1
    assert [token_id for token_id, _ in token.top] == [2, 4, 1]
    assert token.top[0][1] == token.logprob == pytest.approx(token.top[1][1], abs=1e-5)


def candidates(logits, num_candidates):
    token_ids, logprobs = ToHost([find_candidates(torch.tensor([logits]), num_candidates)]).wait()[
        0
    ]
    return token_ids[0].tolist(), logprobs[0].tolist()


def test_candidates_of_a_beam_are_the_likeliest_with_their_logprobs():
    logits = [1.0, 2.0, -INF, 2.0, 0.0]
    token_ids, logprobs = candidates(logits, 3)
    assert token_ids == [1, 3, 0]
    assert logprobs == pytest.approx(torch.tensor(logits).log_softmax(-1)[[1, 3, 0]].tolist())


def test_a_beam_has_no_candidates_that_must_not_come():
    token_ids, logprobs = candidates([-INF, 2.0, -INF, 2.0], 4)
    assert token_ids[:2] == [1, 3]
    assert logprobs[2:] == [-INF, -INF]
