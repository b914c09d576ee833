"""Deltas to outputs, however they were grouped on the way."""

from __future__ import annotations

import pytest

from pagoda_runtime.client.output_processor import OutputProcessor, WholeChoice, engine_params
from pagoda_runtime.client.outputs import make_outputs
from pagoda_runtime.ipc.messages import RequestDelta, TokenLogprobs
from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def make_deltas(tokenizer, text, size, index=0, logprob=-1.0):
    """The deltas of one choice, `size` tokens each, ended by length."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = []
    for first in range(0, len(token_ids), size):
        some = token_ids[first : first + size]
        is_end = first + size >= len(token_ids)
        deltas.append(
            RequestDelta(
                request_id="r",
                index=index,
                new_token_ids=some,
                logprobs=[TokenLogprobs(i, logprob, 1, [(i, logprob)]) for i in some],
                finish_reason="length" if is_end else None,
                cumulative_logprob=logprob * (first + len(some)),
            )
        )
    return deltas


def collect(tokenizer, params, deltas):
    """The outputs, and whether a choice was ended here. As by a stream, nothing follows then."""
    processor = OutputProcessor(tokenizer, params, [1])
    choices = [WholeChoice() for _ in range(params.num_choices)]
    stopped = set()
    for delta in deltas:
        if delta.index not in stopped:
            shown = processor.take(delta)
            choices[delta.index].take(shown)
            if shown.finish_reason is not None and delta.finish_reason is None:
                stopped.add(delta.index)
    return make_outputs(tokenizer, params, choices), bool(stopped)


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_what_is_kept_before_a_stop_string_does_not_depend_on_the_grouping(tokenizer, size):
    params = SamplingParams(stop=("lo w",), logprobs=0)
    (output,), is_stopped = collect(tokenizer, params, make_deltas(tokenizer, "hello world", size))
    assert output.text == "hel"
    assert tokenizer.decode(output.token_ids) == "hello w"
    assert len(output.logprobs) == 7
    assert output.cumulative_logprob == -7.0
    assert (output.finish_reason, output.stop_reason) == ("stop", "lo w")
    # Only a choice that the engine still computes has to be ended there.
    assert is_stopped == (size < 11)


def test_the_best_choices_are_told_by_the_mean_logprob(tokenizer):
    params = SamplingParams(n=2, best_of=3)
    deltas = [
        *make_deltas(tokenizer, "a", 1, index=0, logprob=-2.0),
        *make_deltas(tokenizer, "bbbb", 1, index=1, logprob=-1.0),
        *make_deltas(tokenizer, "ccc", 1, index=2, logprob=-0.5),
    ]
    outputs, _ = collect(tokenizer, params, deltas)
    assert [(output.index, output.text) for output in outputs] == [(0, "ccc"), (1, "bbbb")]
    assert [output.logprobs for output in outputs] == [None, None]


def test_choices_of_equal_number_stay_in_order(tokenizer):
    deltas = [
        *make_deltas(tokenizer, "b", 1, index=1, logprob=-0.1),
        *make_deltas(tokenizer, "a", 1, index=0, logprob=-2.0),
    ]
    outputs, _ = collect(tokenizer, SamplingParams(n=2), deltas)
    assert [output.text for output in outputs] == ["a", "b"]


def test_the_likeliest_tokens_follow_the_chosen_one(tokenizer):
    a, b, c = tokenizer.encode("abc", add_special_tokens=False)
    delta = RequestDelta(
        request_id="r",
        new_token_ids=[c],
        logprobs=[TokenLogprobs(c, -3.0, 7, [(a, -0.5), (b, -1.0)])],
        finish_reason="stop",
    )
    (output,), _ = collect(tokenizer, SamplingParams(logprobs=2), [delta])
    shown = [(p.decoded_token, p.rank, p.logprob) for p in output.logprobs[0].values()]
    assert shown == [("c", 7, -3.0), ("a", 1, -0.5), ("b", 2, -1.0)]


def test_logprobs_are_asked_for_where_a_stop_string_may_hide_tokens_from_the_engine():
    assert engine_params(SamplingParams(best_of=2, stop=("x",))).logprobs == 0
    assert engine_params(SamplingParams(best_of=2)).logprobs is None
    assert engine_params(SamplingParams(stop=("x",))).logprobs is None
