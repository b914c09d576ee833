from __future__ import annotations

import math

import pytest

from pagoda_runtime.errors import RequestError
from pagoda_runtime.sampling_params import SamplingParams


def refusal(**fields):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields).verify()
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 128},
        {"n": 2, "best_of": 5},
        {"n": 1, "best_of": 1, "temperature": 0.0},
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1.0},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 10},
        {"logit_bias": dict.fromkeys(range(300), -100.0)},
        {"min_tokens": 5, "max_tokens": 5},
        {"min_tokens": 5, "max_tokens": None},
        {"seed": -(2**63)},
        {"logprobs": 20, "prompt_logprobs": 0},
        {"stop": ("x",) * 16, "bad_words": ("x",) * 1000},
        {"use_beam_search": True, "n": 64},
        {"use_beam_search": True, "n": 2, "beam_width": 4, "best_of": 4, "temperature": 0.0},
        {"use_beam_search": True, "best_of": 3, "early_stopping": "never", "length_penalty": -1.5},
        {"use_beam_search": True, "min_tokens": 2, "stop_token_ids": (1,), "logit_bias": {1: 2.0}},
    ],
)
def test_values_in_range_pass(fields):
    SamplingParams(**fields).verify()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n", 0, "from 1 to 128"),
        ("n", 129, "from 1 to 128"),
        ("n", 1.5, "an integer"),
        ("n", True, "an integer"),
        ("n", None, "an integer"),
        ("best_of", 129, "from 1 to 128"),
        ("temperature", -0.1, "from 0 to 2"),
        ("temperature", "hot", "from 0 to 2"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("top_k", -2, "-1 or 0 (all tokens), or an integer of at least 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("presence_penalty", 2.5, "from -2 to 2"),
        ("frequency_penalty", -2.5, "from -2 to 2"),
        ("repetition_penalty", 0.0, "from 0.01 to 10"),
        ("repetition_penalty", 11.0, "from 0.01 to 10"),
        ("min_tokens", -1, "at least 0"),
        ("max_tokens", 0, "at least 1"),
        ("seed", 2**63, "a 64-bit integer"),
        ("logprobs", 21, "from 0 to 20"),
        ("prompt_logprobs", -1, "from 0 to 20"),
        ("beam_width", 65, "from 1 to 64"),
        ("length_penalty", 11.0, "from -10 to 10"),
        ("early_stopping", "always", 'true, false or "never"'),
        ("stop", "word", "a tuple of strings"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(field, value, expected):
    error = refusal(**{field: value})
    assert error.param == field
    assert f"{field} is {value!r}; it must be" in error.message
    assert expected in error.message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "length_penalty",
        "top_k",
        "seed",
    ],
)
def test_no_field_takes_what_is_no_finite_number(field, value):
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ("x",) * 17}, "stop has 17 entries; at most 16 fit."),
        ({"stop": ("x", "")}, "stop has an empty entry; each must have at least one character."),
        ({"bad_words": ("x",) * 1001}, "bad_words has 1001 entries; at most 1000 fit."),
        ({"bad_words_token_ids": ((),)}, "bad_words_token_ids has an empty entry"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "has 301 entries; at most 300 fit."),
        ({"logit_bias": {7: 101.0}}, "logit_bias of token 7 is 101.0; it must be from -100 to 100"),
        ({"logit_bias": {7: math.nan}}, "logit_bias of token 7 is nan"),
        ({"n": 3, "best_of": 2}, "best_of is 2; it must be at least n, which is 3."),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; .* max_tokens, which is 8."),
        ({"n": 2, "temperature": 0.0}, "n is 2; with temperature 0 all choices would be the same"),
        ({"best_of": 2, "temperature": 0.0}, "best_of is 2; with temperature 0"),
        ({"n": 2, "top_k": 1}, "n is 2; with top_k 1 all choices would be the same"),
        ({"beam_width": 2}, "beam_width is 2; it is for beams alone"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0; it is for beams alone"),
        ({"early_stopping": True}, "early_stopping is True; it is for beams alone"),
    ],
)
def test_a_wrong_collection_or_combination_is_named_with_its_numbers(fields, message):
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**fields).verify()
    assert caught.value.param in fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("repetition_penalty", 1.1),
        ("seed", 0),
        ("stop", ("x",)),
        ("logprobs", 0),
        ("prompt_logprobs", 0),
    ],
)
def test_beam_search_refuses_what_it_would_not_heed(field, value):
    error = refusal(use_beam_search=True, n=2, **{field: value})
    assert error.param == field
    assert "use_beam_search does not heed it" in error.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 65}, "n is 65; with use_beam_search it must be at most 64"),
        ({"n": 2, "best_of": 100}, "best_of is 100; with use_beam_search it must be at most 64"),
        ({"n": 5, "beam_width": 4}, "n is 5; it must be at most beam_width, which is 4"),
        ({"stop_token_ids": (1,) * 65}, "has 65 entries; with use_beam_search at most 64 fit"),
        ({"best_of": 5, "beam_width": 4}, "best_of is 5; .* it must be beam_width, which is 4"),
    ],
)
def test_the_numbers_of_a_beam_search_fit_each_other(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(use_beam_search=True, **fields).verify()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("logit_bias", {100: 1.0}, "100"),
        ("allowed_token_ids", (3, -1), "-1"),
        ("stop_token_ids", (100,), "100"),
        ("stop_token_ids", ("5",), "'5'"),
        ("bad_words_token_ids", ((3,), (4, 200)), "200"),
    ],
)
def test_token_ids_are_those_of_the_model(field, value, named):
    with pytest.raises(
        RequestError, match=f"^{field} holds token id {named}; .* most 99"
    ) as caught:
        SamplingParams(**{field: value}).verify_token_ids(vocab_size=100)
    assert caught.value.param == field


def test_some_token_must_be_allowed():
    with pytest.raises(RequestError, match="allowed_token_ids is empty"):
        SamplingParams(allowed_token_ids=()).verify_token_ids(vocab_size=100)
    SamplingParams(allowed_token_ids=(0, 99), logit_bias={99: 1.0}).verify_token_ids(vocab_size=100)
