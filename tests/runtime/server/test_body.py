"""How large a body may be, and how many objects it may become."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server import body, messages_protocol, middleware, responses_protocol
from pagoda_runtime.server.body import default_max_body_bytes, verify_shape
from pagoda_runtime.server.errors import validate
from pagoda_runtime.server.state import INLINE_BODY_BYTES, ServerState
from pagoda_runtime.server.testing import (
    READY,
    FakeEngine,
    make_config,
    make_state,
    running_server,
)


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    return make_state(engine, make_config())


def message_of(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text[:500]
    message: str = answer.json()["error"]["message"]
    assert len(message) < 500
    return message


def text_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" + b"[]," * 40_000 + b"0]", "40001 lists and objects; at most 8192"),
        (text_of([{"role": "user"}] * 9000), "9001 lists and objects"),
        (text_of([{}, "x"] * 9000), "9001 lists and objects"),
        (text_of(["\\", '"', '\\"', "["] * 10_000), "40000 strings; at most 32768"),
        (b"[" + b"1," * 600_000 + b"1]", "600001 values; at most 400000"),
        (b"[" * 100_000, "100000 lists and objects"),
    ],
    ids=["lists", "objects", "mixed", "strings", "numbers", "open"],
)
def test_the_parts_of_a_body_are_counted_before_it_is_parsed(raw, words):
    with pytest.raises(RequestError, match=words):
        verify_shape(raw, max_model_len=200_000)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": '[{"a": [1, 2]}, "b"], ' * 20_000},
        {"prompt": '\\"[{\\' * 50_000},
        {"prompt": ["\\" * 41, '"[[[' * 30_000, '\\"' * 30_000]},
        {"prompt": [list(range(2000))] * 100},
    ],
    ids=["json", "escapes", "backslashes", "ids"],
)
def test_what_stands_in_a_text_is_not_counted(value):
    verify_shape(text_of(value), max_model_len=1000)
    verify_shape(json.dumps(value).encode(), max_model_len=1000)


async def test_a_body_of_very_many_messages_or_lists_is_400(http):
    messages = b'{"role":"user","content":""},' * 100_000
    answer = await http.post("/v1/chat/completions", content=b'{"messages":[' + messages + b"{}]}")
    assert "at most" in message_of(answer)
    nested = b'{"prompt":"a","metadata":{"a":[' + b"[]," * 1_000_000 + b"0]}}"
    assert "lists and objects" in message_of(await http.post("/v1/completions", content=nested))


@pytest.mark.parametrize("depth", [200, 5000, 100_000])
async def test_nesting_is_bounded(http, depth):
    nested = b'{"prompt":"a","metadata":{"a":' + b"[" * depth + b"]" * depth + b"}}"
    message = message_of(await http.post("/v1/completions", content=nested))
    assert "recursion limit" in message or "lists and objects" in message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "1024"),
        ({"stop_token_ids": ["a"] * 1000}, "stop_token_ids[0]", "integer"),
        ({"allowed_token_ids": ["a"] * 5000}, "allowed_token_ids[0]", "integer"),
        ({"bad_words": ["a" * 1025]}, "bad_words[0]", "1024"),
        ({"bad_words": ["a"] * 1001}, "bad_words", "1000"),
        ({"stop": ["a" * 1025]}, "stop", "1024"),
        ({"logit_bias": {f"k{number}": 1 for number in range(301)}}, "logit_bias", "300"),
    ],
)
async def test_every_list_of_a_body_has_a_limit(http, fields, param, words):
    answer = await http.post("/v1/completions", json={"prompt": "a", **fields})
    assert words in message_of(answer)
    assert answer.json()["error"]["param"] == param


async def test_a_conversation_has_at_most_2048_messages(http):
    messages = [{"role": "user", "content": ""}] * 2049
    answer = await http.post("/v1/chat/completions", json={"messages": messages})
    assert "2048" in message_of(answer)


async def test_the_limit_of_a_body_follows_the_context(http, engine):
    engine.ready = msgspec.structs.replace(READY, max_model_len=1000)
    limit = default_max_body_bytes(1000)
    assert limit == 4 * 1024 * 1024 + 64_000
    message = message_of(await http.post("/v1/completions", content=b" " * (limit + 1)), 413)
    for words in (str(limit + 1), f"at most {limit}", "--max-body-bytes"):
        assert words in message
    message_of(await http.post("/v1/completions", content=b" " * limit))


async def test_open_requests_together_hold_a_bounded_number_of_bytes(engine, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_HELD_BYTES", 1_000_000)
    state = make_state(engine, make_config("--max-body-bytes", "900000"))
    first_has_sent, stopped = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 800_000
        first_has_sent.set()
        await stopped.wait()

    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        first = asyncio.create_task(http.post("/v1/completions", content=slow()))
        await first_has_sent.wait()
        await asyncio.sleep(0.1)
        answer = await http.post("/v1/completions", content=b" " * 400_000)
        assert "bytes" in message_of(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        stopped.set()
        message_of(await first)
        message_of(await http.post("/v1/completions", content=b" " * 400_000))


async def test_a_large_body_is_parsed_off_the_loop(http, monkeypatch):
    threads = []

    def verify(raw: bytes, max_model_len: int) -> None:
        threads.append(threading.current_thread())

    monkeypatch.setattr(body, "verify_shape", verify)
    for size in (10, INLINE_BODY_BYTES):
        await http.post("/v1/completions", json={"prompt": "a" * size})
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


@pytest.mark.parametrize(
    ("path", "module"),
    [("/v1/messages", messages_protocol), ("/v1/responses", responses_protocol)],
)
async def test_a_large_conversation_becomes_a_chat_off_the_loop(http, monkeypatch, path, module):
    threads = []

    def follow(make: Any, values: Any) -> Any:
        threads.append(threading.current_thread())
        return validate(make, values)

    monkeypatch.setattr(module, "validate", follow)
    for size in (10, INLINE_BODY_BYTES):
        text = "a" * size
        messages = [{"role": "user", "content": text}]
        fields = {"messages": messages, "max_tokens": 2} if "messages" in path else {"input": text}
        await http.post(path, json=fields)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
