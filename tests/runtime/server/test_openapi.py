"""/openapi.json and /docs, and that real answers are what they say."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pagoda_runtime.server import (
    answers,
    health,
    messages,
    openai,
    pooling,
    responses,
    tokens,
)
from pagoda_runtime.server.response_store import ResponseStore
from pagoda_runtime.server.route_table import DOCUMENTED
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server

STATE = make_state(FakeEngine(make_config().engine), make_config("--api-key", "k"))


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": "Bearer k"}
    async with (
        running_server(STATE) as url,
        httpx.AsyncClient(base_url=url, headers=headers) as http,
    ):
        yield http


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            yield from walk(inner)


def assert_is(model: type[msgspec.Struct], body: Any) -> None:
    """The body has the model's fields and no others."""
    assert msgspec.to_builtins(msgspec.convert(body, model)) == body


async def test_the_document_names_every_route_that_the_server_has(http):
    document = (await http.get("/openapi.json")).json()
    documented = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    served = {
        (method, route.path.replace(":path", ""))
        for routes in (
            *(module.make_routes(STATE) for module in (health, messages, openai, pooling, tokens)),
            responses.make_routes(STATE, ResponseStore()),
        )
        for route in routes
        for method in route.methods
        if method != "HEAD"
    }
    assert documented == served


async def test_every_reference_of_the_document_leads_to_something(http):
    document = (await http.get("/openapi.json")).json()
    references = {part["$ref"] for part in walk(document) if "$ref" in part}
    references |= set(re.findall(r"#/components/\w+/[\w-]+", json.dumps(document)))
    assert references
    for reference in references:
        place = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]
    assert document["openapi"] == "3.1.0"
    assert {o["operationId"] for p in document["paths"].values() for o in p.values()}


async def test_the_document_tells_bodies_streams_errors_and_keys(http):
    document = (await http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert set(operation["responses"]) == {"200", "400", "401", "404", "413", "429", "503"}
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert operation["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "temperature", "stop"} <= set(fields)
    assert fields["temperature"]["description"] == "from 0 to 2"
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [kind["type"] for kind in prompt["anyOf"]] == ["string", "array", "array", "array"]


async def test_both_pages_need_no_key_and_the_page_needs_no_other_host(http):
    del http.headers["authorization"]
    assert (await http.get("/openapi.json")).status_code == 200
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?://|src=|<script", page.text)
    for route in DOCUMENTED:
        assert f"{route.method} {route.path}" in page.text
    links, targets = (set(re.findall(f'{name}="#?(\\w+)"', page.text)) for name in ("href", "id"))
    assert links <= targets


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (route.path, route.answer)
        for route in DOCUMENTED
        if route.method == "GET" and route.answer and "{response_id}" not in route.path
    ],
)
async def test_an_answer_of_a_get_route_is_what_the_document_says(http, path, model):
    assert_is(model, (await http.get(path.format(model="fake"))).json())


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health", "/docs"])
async def test_a_slash_behind_a_path_changes_nothing(http, path):
    plain, with_slash = [await http.get(one) for one in (path, f"{path}/")]
    assert (plain.status_code, with_slash.status_code) == (200, 200)
    assert plain.text == with_slash.text
    assert (await http.post("/v1/completions/", json={"prompt": "a"})).status_code == 200
    metrics = (await http.get("/metrics")).text
    assert 'handler="/v1/completions"' in metrics
    assert f'handler="{path}/"' not in metrics


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2}, {"logprobs": 1, "echo": True, "prompt_logprobs": 1, "n": 2}]
)
async def test_a_completion_is_what_the_document_says(http, fields):
    body = {"prompt": "ab", "max_tokens": 3, "temperature": 1, **fields}
    assert_is(answers.Completion, (await http.post("/v1/completions", json=body)).json())


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"prompt_logprobs": 1}]
)
async def test_a_chat_is_what_the_document_says(http, fields):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    body = {"messages": messages, "max_tokens": 3, **fields}
    assert_is(answers.ChatCompletion, (await http.post("/v1/chat/completions", json=body)).json())


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("path", "fields", "model"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 1}, answers.CompletionChunk),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True},
            answers.ChatCompletionChunk,
        ),
    ],
)
async def test_a_chunk_is_what_the_document_says(http, path, fields, model, usage):
    body = {**fields, "max_tokens": 3, "stream": True, **usage}
    answer = await http.post(path, json=body)
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        assert_is(model, json.loads(event))


async def test_an_error_is_what_the_document_says(http):
    for path, content in (("/v1/completions", b"{"), ("/v1/nowhere", b"")):
        assert_is(answers.Error, (await http.post(path, content=content)).json())
