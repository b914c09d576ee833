"""The forms of logprobs, with a tokenizer whose characters may be parts."""

from __future__ import annotations

import msgspec

from pagoda_runtime.client.output_processor import ShownToken
from pagoda_runtime.ipc.messages import TokenLogprobs
from pagoda_runtime.server.logprobs import LEAST_LOGPROB, LogprobsWriter
from pagoda_runtime.server.testing import ByteTokenizer


def writer(num_top: int) -> LogprobsWriter:
    return LogprobsWriter(ByteTokenizer(), num_top=num_top)


def shown(token_id: int, logprob: float, *top: tuple[int, float]) -> ShownToken:
    return ShownToken(0, token_id, TokenLogprobs(token_id, logprob, 1, list(top)))


def test_part_of_a_character_has_its_true_byte():
    (entry,) = writer(0).chat([shown(0xE2, -1.0)]).content
    assert (entry.token, entry.bytes) == ("\ufffd", [0xE2])


def test_a_probability_of_0_is_a_number():
    tokens = [shown(97, float("-inf"), (98, -1.0), (97, float("-inf")))]
    assert writer(2).completion(tokens).token_logprobs == [LEAST_LOGPROB]
    assert writer(2).completion(tokens).top_logprobs == [{"b": -1.0, "a": LEAST_LOGPROB}]


def test_tokens_of_one_text_are_shown_once_with_the_likeliest():
    (top,) = writer(2).completion([shown(97, -3.0, (0xE2, -1.0), (0xE3, -2.0))]).top_logprobs
    assert top == {"\ufffd": -1.0, "a": -3.0}


def test_a_prompt_shows_each_token_and_the_asked_number_of_likeliest_ones():
    token = TokenLogprobs(97, -3.0, 9, [(98, -1.0), (99, -2.0)])
    first, second = writer(0).prompt([token], num_top=1)
    assert first is None
    assert msgspec.to_builtins(second) == {
        "97": {"logprob": -3.0, "rank": 9, "decoded_token": "a"},
        "98": {"logprob": -1.0, "rank": 1, "decoded_token": "b"},
    }


def test_the_likeliest_token_of_a_prompt_is_shown_once():
    token = TokenLogprobs(98, -1.0, 1, [(98, -1.0), (99, -2.0)])
    assert list(writer(0).prompt([token], num_top=2)[1] or ()) == ["98", "99"]
