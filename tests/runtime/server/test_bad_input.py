"""What a wrong request is answered with, and that it disturbs nobody else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.testing import (
    READY,
    ByteTokenizer,
    FakeEngine,
    make_config,
    make_state,
    running_server,
)

MAX_BODY_BYTES = 100_000


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config("--max-num-seqs", "2", "--max-num-waiting", "2").engine)


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    flags = ["--max-num-seqs", "2", "--max-num-waiting", "2", "--api-key", "one", "two"]
    flags += ["--max-body-bytes", str(MAX_BODY_BYTES)]
    return make_state(engine, make_config("--served-model-name", "tiny", *flags))


@pytest_asyncio.fixture
async def http(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with running_server(state) as url:
        key = {"authorization": "Bearer two"}
        async with httpx.AsyncClient(base_url=url, headers=key) as http:
            yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})


async def chat(http: httpx.AsyncClient, *messages: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})


def assert_error(answer: httpx.Response, status: int, *words: str, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b'{"prompt": "a"', b"\xff\xfe", b"[" * 5000])
async def test_bad_json_is_400(http, body):
    assert_error(await http.post("/v1/completions", content=body), 400, "JSON", param=None)


@pytest.mark.parametrize("body", [b"[]", b"3", b'"prompt"'])
async def test_a_body_that_is_no_object_is_400(http, body):
    assert_error(await http.post("/v1/completions", content=body), 400, "body", param=None)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", "five", ["max_tokens", "integer", "'five'"]),
        ("max_tokens", 2.5, ["max_tokens", "integer"]),
        ("max_tokens", int("9" * 4300), ["max_tokens", "2147483648", "a number of 14285 bits"]),
        ("seed", int("9" * 4300), ["64-bit", "a number of 14285 bits"]),
        ("prompt", [int("9" * 4300)], ["a number of 14285 bits", "255"]),
        ("max_tokens", 0, ["max_tokens is 0", "at least 1"]),
        ("max_tokens", 128, ["has 1 tokens", "max_tokens is 128", "together 129", "at most 127"]),
        ("temperature", 3, ["temperature is 3", "0 to 2"]),
        ("temperature", "hot", ["temperature", "number"]),
        ("top_p", 0, ["top_p is 0", "above 0"]),
        ("top_k", -2, ["top_k is -2"]),
        ("stream", "yes", ["stream", "boolean"]),
        ("stream_options", {"include_usage": True}, ["stream_options", "stream: true"]),
        ("stop", [""], ["stop", "one character"]),
        ("stop", ["x"] * 17, ["stop", "16"]),
        ("stop_token_ids", [-1], ["stop_token_ids", "at least 0"]),
        ("seed", 2**64, ["seed", "64-bit"]),
        ("prompt", [], ["prompt", "not an empty list"]),
        ("prompt", "", ["no tokens"]),
        ("prompt", ["a", 1], ["prompt", "list of strings"]),
        ("prompt", [[1], ["a"]], ["prompt", "token ids"]),
        ("prompt", {"text": "a"}, ["prompt", "must be a string"]),
        ("prompt", [1, 256], ["256", "255"]),
        ("prompt", [[-1]], ["-1", "0"]),
        ("prompt", "a" * 128, ["128 tokens", "127"]),
        ("prompt", ["a"] * 5, ["5 prompts", "at most 4"]),
        ("n", 0, ["n is 0", "1 to 128"]),
        ("n", True, ["n:", "integer", "True"]),
        ("n", 257, ["n is 257", "1 to 128"]),
        ("best_of", 0, ["best_of is 0", "1 to 128"]),
        ("beam_width", 4, ["beam_width is 4", "use_beam_search"]),
        ("length_penalty", 0.5, ["length_penalty is 0.5", "use_beam_search"]),
        ("early_stopping", True, ["early_stopping is True", "use_beam_search"]),
        ("use_beam_search", "yes", ["use_beam_search", "boolean"]),
        ("presence_penalty", 2.1, ["presence_penalty is 2.1", "-2 to 2"]),
        ("frequency_penalty", -3, ["frequency_penalty is -3", "-2 to 2"]),
        ("repetition_penalty", 0, ["repetition_penalty is 0", "10"]),
        ("repetition_penalty", "NaN", ["repetition_penalty", "number"]),
        ("min_p", 1.5, ["min_p is 1.5", "0 to 1"]),
        ("min_tokens", -1, ["min_tokens is -1", "at least 0"]),
        ("min_tokens", 2, ["min_tokens is 2", "at most max_tokens, which is 1"]),
        ("logit_bias", {"a": 1}, ["logit_bias", "token ids", "'a'"]),
        ("logit_bias", {"01": 1}, ["logit_bias", "token ids", "'01'"]),
        ("logit_bias", {"5": 101}, ["logit_bias of token 5 is 101", "-100 to 100"]),
        ("logit_bias", {"256": 1}, ["logit_bias", "256", "255"]),
        ("logit_bias", [1], ["logit_bias", "a list of 1"]),
        ("allowed_token_ids", [], ["allowed_token_ids", "empty"]),
        ("allowed_token_ids", [300], ["allowed_token_ids", "300", "255"]),
        ("bad_words", [""], ["bad_words", "empty"]),
        ("bad_words", "word", ["bad_words", "array", "'word'"]),
        ("stop_token_ids", [256], ["stop_token_ids", "256", "255"]),
        ("logprobs", 21, ["logprobs is 21", "0 to 20"]),
        ("logprobs", True, ["logprobs", "integer", "True"]),
        ("logprobs", -1, ["logprobs is -1", "0 to 20"]),
        ("prompt_logprobs", 21, ["prompt_logprobs is 21", "0 to 20"]),
        ("echo", 1, ["echo", "boolean"]),
        ("priority", 1001, ["priority", "1000", "1001"]),
        ("priority", -1001, ["priority", "-1000", "-1001"]),
        ("cache_salt", "", ["cache_salt", "1 character"]),
        ("truncate_prompt_tokens", 0, ["truncate_prompt_tokens", "at least 1, or -1", "got 0"]),
        ("truncate_prompt_tokens", -2, ["truncate_prompt_tokens", "at least 1, or -1", "got -2"]),
        ("include_stop_str_in_output", "no", ["include_stop_str_in_output", "boolean"]),
    ],
)
async def test_a_wrong_value_is_named_with_its_numbers(http, field, value, words):
    assert_error(await complete(http, **{field: value}), 400, *words, param=field)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2, "temperature": 0}, "n", ["n is 2", "temperature 0"]),
        ({"n": 3, "best_of": 2}, "best_of", ["best_of is 2", "at least n, which is 3"]),
        ({"best_of": 2, "stream": True}, "best_of", ["best_of is 2", "stream"]),
        ({"n": 3}, "n", ["n is 3", "runs 2 sequences", "--max-num-seqs"]),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ["stream: true"]),
        ({"use_beam_search": True, "n": 2, "top_p": 0.5}, "top_p", ["top_p is 0.5", "beam"]),
        ({"use_beam_search": True, "stop": "x"}, "stop", ["stop", "beam"]),
        ({"use_beam_search": True, "n": 2, "beam_width": 1}, "n", ["n is 2", "which is 1"]),
    ],
)
async def test_fields_that_contradict_each_other_are_named(http, engine, fields, param, words):
    engine.ready = msgspec.structs.replace(READY, max_num_seqs=2)
    assert_error(await complete(http, **fields), 400, *words, param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
    ],
)
async def test_a_chat_s_own_fields_are_verified(http, fields, param):
    messages = [{"role": "user", "content": "a"}]
    answer = await http.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert_error(answer, 400, param, param=param)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "presence_penalty", "min_p", "top_p"])
async def test_a_number_that_is_none_is_400(http, field, value):
    body = f'{{"prompt": "a", "{field}": {value}}}'
    assert_error(await http.post("/v1/completions", content=body), 400, field, param=field)


async def test_a_lone_surrogate_is_400(http):
    body = b'{"prompt": "\\ud800"}'
    assert (await http.post("/v1/completions", content=body)).status_code == 400


async def test_a_missing_prompt_is_named(http):
    answer = await http.post("/v1/completions", json={})
    assert_error(answer, 400, "prompt is missing", param="prompt")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "a"}, "messages[0].tool_call_id"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
async def test_a_wrong_message_is_named_by_its_path(http, message, param):
    assert_error(await chat(http, message), 400, param, param=param)


async def test_a_content_part_that_is_no_text_is_refused(http):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    answer = await chat(http, {"role": "user", "content": parts})
    words = ("messages[0].content[1]: text parts only", "'image_url'")
    assert_error(answer, 400, *words, param="messages[0].content[1]")
    assert "string" not in answer.text


async def test_a_conversation_without_messages_is_400(http):
    assert_error(await chat(http), 400, "messages", param="messages")


async def test_an_unknown_model_is_404_with_the_served_ones(http):
    answer = await complete(http, model="gpt-9")
    assert_error(answer, 404, "gpt-9", "tiny", param="model")
    assert (await http.get("/v1/models/gpt-9")).status_code == 404


async def test_an_unknown_path_and_a_wrong_method_have_the_same_shape(http):
    assert_error(await http.get("/v2"), 404, "/v2", param=None)
    answer = await http.get("/v1/completions")
    assert_error(answer, 405, "POST", param=None)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Bearer three"}, {"authorization": "one"}]
)
async def test_a_wrong_key_is_401_on_v1_alone(http, header):
    http.headers.pop("authorization")
    answer = await http.get("/v1/models", headers=header)
    assert_error(answer, 401, "API key", param=None)
    assert "running" in answer.headers["x-pagoda-load"]
    for path in ("/health", "/ready", "/load", "/metrics", "/version", "/startup"):
        assert (await http.get(path, headers=header)).status_code == 200


@pytest.mark.parametrize("key", ["one", "two"])
async def test_each_key_opens(http, key):
    answer = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200


async def test_a_large_body_is_413(http):
    answer = await complete(http, prompt="a" * MAX_BODY_BYTES)
    assert_error(answer, 413, "100000", param=None)


async def test_a_large_body_without_an_announced_length_is_413(http):
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    answer = await http.post("/v1/completions", content=chunks())
    assert_error(answer, 413, "100000", param=None)


async def test_a_full_queue_is_429_with_retry_after(http, engine):
    engine.step_seconds = 0.05
    running = [asyncio.create_task(complete(http, max_tokens=20)) for _ in range(4)]
    while len(engine.running) < 4:
        await asyncio.sleep(0.001)
    answer = await complete(http)
    assert_error(answer, 429, "4 requests", "--max-num-waiting", param=None)
    assert int(answer.headers["retry-after"]) >= 1
    assert [(await task).status_code for task in running] == [200] * 4


async def test_a_loading_server_is_503_with_retry_after(http, engine):
    engine.ready = None
    for answer in (await complete(http), await http.get("/v1/models")):
        assert_error(answer, 503, "loading", param=None)
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_dead_engine_is_503(http, engine):
    engine.failure = EngineFailed(reason="RankDied", message="it crashed")
    assert_error(await complete(http), 503, "it crashed", param=None)


async def test_a_crash_of_a_route_is_500_and_says_nothing_of_the_inside(http, engine, caplog):
    engine.ready = msgspec.structs.replace(READY, max_model_len="not a number")
    answer = await complete(http)
    assert_error(answer, 500, "Internal error", param=None)
    assert "not a number" not in answer.text
    assert any("TypeError" in str(record.exc_info) for record in caplog.records)


async def test_bad_requests_do_not_disturb_a_running_one(http, engine):
    engine.step_seconds = 0.005
    running = asyncio.create_task(complete(http, max_tokens=60))
    bad: list[dict[str, Any]] = [{"max_tokens": 999}, {"prompt": []}, {"n": 300}, {"model": "x"}]
    answers = await asyncio.gather(*(complete(http, **fields) for fields in bad * 5))
    assert {answer.status_code for answer in answers} <= {400, 404}
    assert (await running).json()["usage"]["completion_tokens"] == 60


async def test_tokenizing_a_big_prompt_delays_nobody_s_stream_and_counts_as_waiting(
    http, state, engine
):
    is_answered = threading.Event()

    class PatientTokenizer(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            is_answered.wait(10)
            return super().encode(text, add_special_tokens)

    state.tokenizer = PatientTokenizer(longest_token=100)
    big = asyncio.create_task(complete(http, prompt="a" * 5000))
    while not state.num_tokenizing:
        await asyncio.sleep(0.001)
    assert json.loads((await http.get("/load")).text)["waiting"] == 1
    answer = await complete(http, prompt=[97], max_tokens=20)
    assert answer.status_code == 200
    assert not big.done()
    is_answered.set()
    assert (await big).status_code == 400
    assert state.num_tokenizing == 0


async def test_the_openai_client_knows_the_errors(http):
    async with openai.AsyncOpenAI(
        base_url=f"{http.base_url}/v1", api_key="wrong", max_retries=0
    ) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with openai.AsyncOpenAI(
        base_url=f"{http.base_url}/v1", api_key="one", max_retries=0
    ) as client:
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-9", prompt="a")
