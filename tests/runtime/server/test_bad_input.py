"""What a wrong request is answered with, and that it disturbs nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from pagoda_runtime.engine.messages import EngineFailed
from pagoda_runtime.server.protocol import UNSUPPORTED
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.testing import (
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
    return make_state(engine, make_config("--served-model-name", "tiny", *flags))


@pytest_asyncio.fixture
async def http(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with running_server(state, max_body_bytes=MAX_BODY_BYTES) as url:
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
    ],
)
async def test_a_wrong_value_is_named_with_its_numbers(http, field, value, words):
    assert_error(await complete(http, **{field: value}), 400, *words, param=field)


async def test_a_lone_surrogate_is_400(http):
    body = b'{"prompt": "\\ud800"}'
    assert (await http.post("/v1/completions", content=body)).status_code == 400


async def test_a_missing_prompt_is_named(http):
    answer = await http.post("/v1/completions", json={})
    assert_error(answer, 400, "prompt is missing", param="prompt")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "a"}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
    ],
)
async def test_a_wrong_message_is_named_by_its_path(http, message, param):
    assert_error(await chat(http, message), 400, param, param=param)


async def test_a_content_part_that_is_no_text_is_refused(http):
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    answer = await chat(http, {"role": "user", "content": [part]})
    assert_error(answer, 400, "'text'", "'image_url'", param="messages[0].content")


async def test_a_conversation_without_messages_is_400(http):
    assert_error(await chat(http), 400, "messages", param="messages")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", 0),
        ("logprobs", True),
        ("echo", True),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("min_p", 0.1),
    ],
)
async def test_a_field_that_is_not_served_is_refused_by_name(http, field, value):
    assert field in UNSUPPORTED
    assert_error(await complete(http, **{field: value}), 400, field, param=field)


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
    engine.ready = "not a fact"  # type: ignore[assignment]
    answer = await complete(http)
    assert_error(answer, 500, "Internal error", param=None)
    assert "max_model_len" not in answer.text
    assert any("max_model_len" in str(record.exc_info) for record in caplog.records)


async def test_bad_requests_do_not_disturb_a_running_one(http, engine):
    engine.step_seconds = 0.005
    running = asyncio.create_task(complete(http, max_tokens=60))
    bad: list[dict[str, Any]] = [{"max_tokens": 999}, {"prompt": []}, {"n": 3}, {"model": "x"}]
    answers = await asyncio.gather(*(complete(http, **fields) for fields in bad * 5))
    assert {answer.status_code for answer in answers} <= {400, 404}
    assert (await running).json()["usage"]["completion_tokens"] == 60


async def test_tokenizing_a_big_prompt_delays_nobody_s_stream_and_counts_as_waiting(
    http, state, engine
):
    state.tokenizer = ByteTokenizer(encode_seconds=0.5)
    big = asyncio.create_task(complete(http, prompt="a" * 5000))
    while not state.num_tokenizing:
        await asyncio.sleep(0.001)
    assert json.loads((await http.get("/load")).text)["waiting"] == 1
    loop = asyncio.get_running_loop()
    started = loop.time()
    answer = await complete(http, prompt=[97], max_tokens=20)
    assert answer.status_code == 200
    assert loop.time() - started < 0.3
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
