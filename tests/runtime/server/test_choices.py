"""Several choices, logprobs and echo through HTTP, with a fake engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server

# Choice k of the fake engine begins k bytes later in this.
ANSWER = "abcdef"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config().engine, answer=ANSWER)


@pytest_asyncio.fixture
async def http(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    state = make_state(engine, make_config("--served-model-name", "tiny"))
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "xy", "max_tokens": 3, **fields}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def chat(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, **fields}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(http: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"max_tokens": 3, "stream": True, **fields}
    answer = await http.post(path, json=body)
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


async def test_n_choices_of_each_prompt_are_numbered_through(http):
    answer = await complete(http, prompt=["x", "yz"], n=2)
    assert texts(answer) == ["abc", "bcd", "abc", "bcd"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 8


async def test_choices_of_a_chat(http):
    answer = await chat(http, n=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["abc", "bcd"]


async def test_streamed_choices_carry_their_index(http):
    chunks = await stream(http, "/v1/completions", prompt="xy", n=2)
    found = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        found[choice["index"]] += choice["text"]
    assert found == {0: "abc", 1: "bcd"}


async def test_each_choice_of_a_streamed_chat_begins_with_the_role(http):
    messages = [{"role": "user", "content": "Hi"}]
    chunks = await stream(http, "/v1/chat/completions", messages=messages, n=2)
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1]


async def test_the_best_are_shown_best_first_and_all_are_counted(http):
    answer = await complete(http, n=2, best_of=4)
    # The last choice of the fake engine is the likeliest.
    assert texts(answer) == ["def", "cde"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 12


async def test_a_stop_string_ends_one_choice_and_the_engine_stops_it_alone(http, engine):
    answer = await complete(http, n=2, stop="d", max_tokens=6)
    assert texts(answer) == ["abc", "bc"]
    assert {choice["stop_reason"] for choice in answer["choices"]} == {"d"}
    assert not engine.running
    answer = await complete(http, n=2, stop="cda", max_tokens=4)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    answer = await complete(http, n=2, stop="ea", max_tokens=4, stop_token_ids=[ord("f")])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 8


async def test_a_choice_that_ends_early_leaves_the_others_running(http):
    answer = await complete(http, n=2, max_tokens=5, stop="bcdef")
    assert texts(answer) == ["abcde", ""]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop"]


async def test_a_stop_string_is_shown_if_asked_for(http):
    answer = await complete(http, stop="bc", max_tokens=6, include_stop_str_in_output=True)
    assert texts(answer) == ["abc"]


async def test_logprobs_of_a_completion(http):
    answer = await complete(http, logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-1.0, -1.0, -1.0],
        "top_logprobs": [{"b": -0.5, "a": -1.0}, {"c": -0.5, "b": -1.0}, {"d": -0.5, "c": -1.0}],
        "text_offset": [0, 1, 2],
    }


@pytest.mark.parametrize(("top", "shown"), [(0, ["a"]), (1, ["b", "a"]), (3, ["b", "a", "`"])])
async def test_the_token_itself_is_always_among_the_top(http, top, shown):
    answer = await complete(http, logprobs=top)
    assert list(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == shown


async def test_tokens_may_be_shown_as_ids(http):
    answer = await complete(http, logprobs=1, return_tokens_as_token_ids=True)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:97", "token_id:98", "token_id:99"]
    assert set(logprobs["top_logprobs"][0]) == {"token_id:98", "token_id:97"}


async def test_logprobs_of_a_chat(http):
    answer = await chat(http, logprobs=True, top_logprobs=1, max_tokens=1)
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -1.0,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


async def test_the_openai_client_reads_the_logprobs(http):
    async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="any") as client:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=2,
            logprobs=True,
            top_logprobs=2,
            n=2,
        )
        assert [c.logprobs.content[0].token for c in answer.choices] == ["a", "b"]
        completion = await client.completions.create(
            model="tiny", prompt="x", max_tokens=2, logprobs=2, echo=True
        )
        assert completion.choices[0].logprobs.tokens == ["x", "a", "b"]


async def test_logprobs_wait_with_the_text_that_is_held_back(http, engine):
    engine.answer = "aé€xyz".encode()
    chunks = await stream(http, "/v1/completions", prompt="q", logprobs=0, stop="yy", max_tokens=9)
    shown = [(c["choices"][0]["text"], c["choices"][0]["logprobs"]) for c in chunks]
    assert [text for text, _ in shown] == ["a", "é", "€", "x", "yz"]
    assert [logprobs["text_offset"] for _, logprobs in shown] == [
        [0],
        [1, 1],
        [2, 2, 2],
        [3],
        [4, 5],
    ]
    assert "".join(text for text, _ in shown) == "aé€xyz"


async def test_what_a_stop_string_cut_off_has_no_logprobs(http):
    answer = await complete(http, logprobs=0, stop="cd", max_tokens=6)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    answer = await complete(
        http, logprobs=0, stop="cd", max_tokens=6, include_stop_str_in_output=True
    )
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c", "d"]


async def test_a_token_without_text_has_its_logprob(http):
    answer = await complete(http, logprobs=0, stop_token_ids=[ord("c")])
    logprobs = answer["choices"][0]["logprobs"]
    assert texts(answer) == ["ab"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["a", "b", "c"], [0, 1, 2])


async def test_an_echo_is_the_prompt_in_front_of_each_choice(http):
    assert texts(await complete(http, prompt="x€", echo=True, n=2)) == ["x€abc", "x€bcd"]
    ids = list("x€".encode())
    assert texts(await complete(http, prompt=ids, echo=True)) == ["x€abc"]


async def test_an_echo_with_logprobs_begins_with_those_of_the_prompt(http):
    answer = await complete(http, prompt="x€", echo=True, logprobs=1, max_tokens=1, n=2)
    for choice, (token, logprob) in zip(answer["choices"], [("a", -1.0), ("b", -0.5)], strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["tokens"][0] == "x"
        assert logprobs["tokens"][-1] == token
        assert logprobs["token_logprobs"] == [None, -2.0, -2.0, -2.0, logprob]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["text_offset"] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_no_tokens_and_an_echo_score_the_prompt(http, is_stream):
    fields = {"prompt": "xyz", "echo": True, "logprobs": 0, "max_tokens": 0}
    if is_stream:
        chunks = await stream(http, "/v1/completions", **fields)
        (choice,) = [chunk["choices"][0] for chunk in chunks]
    else:
        answer = await complete(http, **fields)
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == 0
    assert (choice["text"], choice["finish_reason"]) == ("xyz", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -2.0, -2.0]


async def test_a_streamed_echo_comes_with_the_first_chunk_of_each_choice(http):
    chunks = await stream(http, "/v1/completions", prompt="xy", echo=True, logprobs=0, n=2)
    found: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        found[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
    assert found == {0: "xyabc", 1: "xybcd"}
    assert tokens == {0: list("xyabc"), 1: list("xybcd")}


async def test_prompt_logprobs_are_by_token_id_with_null_first(http):
    answer = await complete(http, prompt="xy", prompt_logprobs=1)
    expected = [
        None,
        {
            "121": {"logprob": -2.0, "rank": 2, "decoded_token": "y"},
            "122": {"logprob": -1.5, "rank": 1, "decoded_token": "z"},
        },
    ]
    assert answer["choices"][0]["prompt_logprobs"] == expected
    answer = await chat(http, prompt_logprobs=0)
    assert answer["prompt_logprobs"][0] is None
    assert all(len(tokens) == 1 for tokens in answer["prompt_logprobs"][1:])


async def test_prompt_logprobs_that_nobody_asked_for_are_null(http):
    assert (await complete(http))["choices"][0]["prompt_logprobs"] is None
    assert (await chat(http))["prompt_logprobs"] is None
