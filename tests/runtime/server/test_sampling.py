"""From the body of a request to the parameters of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pagoda_runtime.errors import RequestError
from pagoda_runtime.sampling_params import FIELDS
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.protocol import CompletionRequest
from pagoda_runtime.server.sampling import to_sampling_params
from pagoda_runtime.server.start import start
from pagoda_runtime.server.testing import ByteTokenizer, FakeEngine, make_config, make_state

DEFAULTS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_tokens": 9,
}


def params_of(**fields: Any):
    body = CompletionRequest(prompt="a", **fields)
    return to_sampling_params(body, ByteTokenizer(), DEFAULTS)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n", 3, 3),
        ("best_of", 3, 3),
        ("presence_penalty", 0.5, 0.5),
        ("frequency_penalty", -1, -1.0),
        ("repetition_penalty", 1.2, 1.2),
        ("min_p", 0.1, 0.1),
        ("min_tokens", 4, 4),
        ("seed", 7, 7),
        ("top_k", 5, 5),
        ("stop", "x", ("x",)),
        ("stop", ["x", "y"], ("x", "y")),
        ("stop_token_ids", [4], (4,)),
        ("logit_bias", {"42": -1.5}, {42: -1.5}),
        ("allowed_token_ids", [1, 2], (1, 2)),
        ("include_stop_str_in_output", True, True),
        ("ignore_eos", True, True),
        ("skip_special_tokens", False, False),
        ("logprobs", 0, 0),
        ("prompt_logprobs", 3, 3),
    ],
)
def test_a_field_reaches_the_engine(field, value, expected):
    assert getattr(params_of(**{field: value}), field) == expected


def test_every_sampling_parameter_is_a_field_of_both_bodies():
    # Words are tokenized here, and grammars written.
    for body in (ChatCompletionRequest, CompletionRequest):
        assert FIELDS.keys() - body.model_fields.keys() == {"bad_words_token_ids", "grammar"}


@pytest.mark.parametrize("field", ["n", "prompt_logprobs", "best_of"])
def test_a_number_of_any_length_is_answered_with_its_range(field):
    with pytest.raises(RequestError, match="bits; it must be an integer from"):
        params_of(**{field: 10**5000, "stream": True})


def test_the_checkpoint_s_defaults_fill_what_a_request_leaves_out():
    # A limit that the request brings itself may lie below what the checkpoint allows by default.
    params = params_of(top_p=0.5, repetition_penalty=1.0, min_tokens=10)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 20)
    assert (params.min_p, params.repetition_penalty, params.max_tokens) == (0.1, 1.0, None)


def test_beams_do_without_the_checkpoint_s_defaults():
    params = params_of(
        use_beam_search=True, beam_width=4, length_penalty=0.5, early_stopping="never"
    )
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)
    assert (params.num_beams, params.length_penalty, params.early_stopping) == (4, 0.5, "never")


def test_bad_words_are_tokenized_with_and_without_a_space():
    assert params_of(bad_words=["ab"]).bad_words_token_ids == ((97, 98),)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_a_chat_has_its_own_way_to_ask_for_logprobs(fields, expected):
    body = ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **fields)
    assert to_sampling_params(body, ByteTokenizer(), {}).logprobs == expected


def test_an_echo_with_logprobs_asks_for_those_of_the_prompt():
    assert params_of(echo=True, logprobs=2).prompt_logprobs == 2
    assert params_of(echo=True, logprobs=2, prompt_logprobs=5).prompt_logprobs == 5
    assert params_of(echo=True).prompt_logprobs is None


async def test_priority_and_salt_reach_the_engine_and_a_long_prompt_is_cut_from_the_left():
    engine = FakeEngine(make_config().engine)
    state = make_state(engine, make_config())
    body = CompletionRequest(
        prompt=["hello"], priority=-5, cache_salt="me", truncate_prompt_tokens=2
    )
    answer = await asyncio.wait_for(start(state, body, 0.0), 5)
    assert list(engine.places.values()) == [(-5, "me")]
    assert list(engine.prompts.values()) == [list(b"lo")]
    for generation in answer.generations:
        await generation.close("abort")
