from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagoda_runtime.execution.logits import (
    added_by_bits,
    is_processed,
    process_logits,
)
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.sampling_params import SamplingParams

INF = math.inf
VOCAB_SIZE = 12
EOS = (1, 2)


def make_row(params, *, prompt=(), output=()):
    history = [*prompt, *output]
    return ScheduledRow(
        request_id="r",
        token_ids=[0],
        start=len(history),
        block_table=[1],
        sampling_params=params,
        num_prompt_tokens=len(prompt),
        num_output_tokens=len(output),
        history=history if params.needs_history else None,
    )


def process(logits, *, prompt=(), output=(), **params):
    row = make_row(SamplingParams(**params), prompt=prompt, output=output)
    return process_logits(torch.tensor([logits]), [row], EOS)[0].tolist()


def plainly_processed(logits, params, prompt, output):
    """What process_logits says it does, token by token."""
    said = [*prompt, *output]
    forbidden = set()
    for word in params.bad_words_token_ids:
        start = len(said) - len(word) + 1
        if start >= 0 and said[start:] == list(word[:-1]):
            forbidden.add(word[-1])
    if len(output) < params.min_tokens:
        forbidden |= {*EOS, *params.stop_token_ids}
    allowed = set(range(VOCAB_SIZE))
    if params.allowed_token_ids is not None:
        allowed = set(params.allowed_token_ids)
    possible = allowed - forbidden or allowed
    result = []
    for token_id, logit in enumerate(logits):
        value = logit if token_id in possible else -INF
        value += params.logit_bias.get(token_id, 0.0)
        if token_id in said:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        if token_id in output:
            value -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
        result.append(value)
    return result


token_id = st.integers(0, VOCAB_SIZE - 1)
numbers = st.floats(-2, 2, width=32)
every_params = st.builds(
    SamplingParams,
    presence_penalty=numbers,
    frequency_penalty=numbers,
    repetition_penalty=st.floats(0.5, 4, width=32),
    logit_bias=st.dictionaries(token_id, st.floats(-100, 100, width=32), max_size=4),
    allowed_token_ids=st.none() | st.lists(token_id, min_size=1, max_size=4).map(tuple),
    bad_words_token_ids=st.lists(
        st.lists(token_id, min_size=1, max_size=3).map(tuple), max_size=6
    ).map(tuple),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(token_id, max_size=3).map(tuple),
)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE),
    params=every_params,
    prompt=st.lists(token_id, max_size=6),
    output=st.lists(token_id, max_size=6),
)
def test_logits_are_processed_as_a_plain_loop_would(logits, params, prompt, output):
    given_logits = torch.tensor([logits])
    row = make_row(params, prompt=prompt, output=output)
    processed = process_logits(given_logits, [row], EOS)
    expected = torch.tensor([plainly_processed(logits, params, prompt, output)])
    torch.testing.assert_close(processed, expected, atol=1e-4, rtol=1e-5)
    assert given_logits.tolist() == [logits]
    if not is_processed(row):
        assert processed.tolist() == [logits]


@given(
    of_rows=st.lists(
        st.tuples(every_params, st.lists(token_id, max_size=6), st.lists(token_id, max_size=6)),
        min_size=2,
        max_size=5,
    )
)
def test_rows_are_processed_together_as_they_are_alone(of_rows):
    logits = torch.linspace(-9, 9, len(of_rows) * VOCAB_SIZE).view(len(of_rows), VOCAB_SIZE)
    rows = [make_row(params, prompt=prompt, output=output) for params, prompt, output in of_rows]
    together = process_logits(logits, rows, EOS)
    for index, row in enumerate(rows):
        assert torch.equal(together[index, None], process_logits(logits[index, None], [row], EOS))


def test_only_allowed_tokens_are_left():
    assert process([1.0, 2.0, 3.0, 4.0], allowed_token_ids=(2, 0, 2)) == [1.0, -INF, 3.0, -INF]


def test_a_bad_word_is_forbidden_where_it_would_be_completed():
    words = {"bad_words_token_ids": ((3,), (0, 0, 4))}
    logits = [0.0] * 5
    assert process(logits, output=[0], **words) == [0.0, 0.0, 0.0, -INF, 0.0]
    assert process(logits, prompt=[0], output=[0], **words) == [0.0, 0.0, 0.0, -INF, -INF]
    assert process(logits, output=[0, 0, 1], **words) == [0.0, 0.0, 0.0, -INF, 0.0]


def test_min_tokens_holds_back_end_tokens_and_stop_ids():
    params = {"min_tokens": 2, "stop_token_ids": (3,)}
    logits = [0.0] * 5
    assert process(logits, output=[4], **params) == [0.0, -INF, -INF, -INF, 0.0]
    assert process(logits, output=[4, 4], **params) == logits


def test_bans_that_leave_no_token_give_way():
    assert process([1.0, 2.0, 3.0], allowed_token_ids=(1,), min_tokens=1) == [-INF, 2.0, -INF]
    assert process([1.0, 2.0], bad_words_token_ids=((0,), (1,))) == [1.0, 2.0]


def test_repetition_sees_the_prompt_and_the_other_penalties_do_not():
    history = {"prompt": [0, 1], "output": [1, 2, 2]}
    logits = [4.0, -4.0, 4.0, 4.0]
    assert process(logits, repetition_penalty=2.0, **history) == [2.0, -8.0, 2.0, 4.0]
    assert process(logits, presence_penalty=1.0, **history) == [4.0, -5.0, 3.0, 4.0]
    assert process(logits, frequency_penalty=1.0, **history) == [4.0, -5.0, 2.0, 4.0]


def test_the_penalty_of_repetition_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, said = torch.randn(50), torch.randint(0, 50, (30,))
    row = make_row(SamplingParams(repetition_penalty=1.3), prompt=said.tolist())
    expected = RepetitionPenaltyLogitsProcessor(1.3)(said[None], logits[None].clone())[0]
    assert torch.equal(process_logits(logits[None], [row], EOS)[0], expected)


def test_a_bias_is_added_before_penalties():
    logits = process([1.0, 1.0], prompt=[0], logit_bias={0: 3.0}, repetition_penalty=2.0)
    assert logits == [2.0, 1.0]


@pytest.mark.parametrize("wrong", [math.nan, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_out_of_range_become_numbers(dtype, wrong):
    row = make_row(SamplingParams())
    (processed,) = process_logits(torch.tensor([[wrong, -INF, 2.0]], dtype=dtype), [row], EOS)
    assert processed.isfinite().all()
    assert processed[2] == 2.0


def mask_of(*token_ids: int, vocab_size: int = VOCAB_SIZE) -> bytes:
    bits = sum(1 << token_id for token_id in token_ids)
    return bits.to_bytes(4 * -(-vocab_size // 32), "little")


@pytest.mark.parametrize(
    ("params", "mask", "possible"),
    [
        ({}, {3, 5}, {3, 5}),
        ({"allowed_token_ids": (5, 6)}, {3, 5}, {5}),
        ({"allowed_token_ids": (6,)}, {3, 5}, {3, 5}),
        ({"bad_words_token_ids": ((3,),)}, {3, 5}, {5}),
        ({"bad_words_token_ids": ((3,), (5,))}, {3, 5}, {3, 5}),
        ({"min_tokens": 2}, {1, 5}, {5}),
        ({"min_tokens": 2}, {1, 2}, {1, 2}),
        ({"allowed_token_ids": (1, 5), "bad_words_token_ids": ((5,),)}, {1, 3, 5}, {1}),
    ],
)
def test_a_grammars_mask_leaves_its_tokens_and_other_fields_give_way(params, mask, possible):
    row = make_row(SamplingParams(grammar="", **params))
    row = msgspec.structs.replace(row, mask=mask_of(*mask))
    (processed,) = process_logits(torch.zeros(1, VOCAB_SIZE), [row], EOS)
    assert {i for i, logit in enumerate(processed.tolist()) if logit > -INF} == possible


@pytest.mark.parametrize("vocab_size", [31, 32, 70, 320])
def test_masks_are_of_their_own_rows_whatever_rows_are_beside(vocab_size):
    kept = [{0}, {vocab_size - 1, 7}, set(range(vocab_size))]
    rows = [
        msgspec.structs.replace(
            make_row(SamplingParams(grammar="")), mask=mask_of(*ids, vocab_size=vocab_size)
        )
        for ids in kept
    ]
    plain = make_row(SamplingParams())
    logits = torch.randn(len(rows) + 1, vocab_size)
    for some in (rows, [rows[0], plain, *rows[1:]]):
        processed = process_logits(logits[: len(some)], some, EOS)
        for row, before, after in zip(some, logits, processed, strict=False):
            ids = set(range(vocab_size)) if row is plain else kept[rows.index(row)]
            expected = torch.full_like(before, -INF)
            expected[sorted(ids)] = before[sorted(ids)]
            assert torch.equal(after, expected)


def test_a_byte_of_a_mask_adds_to_eight_logits_the_lowest_bit_first():
    added = added_by_bits(torch.tensor([[0b10000010]], dtype=torch.uint8))
    assert added.dtype is torch.float32
    assert added[0, 0].tolist() == [-INF, 0, -INF, -INF, -INF, -INF, -INF, 0]
