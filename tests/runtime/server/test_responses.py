"""/v1/responses through OpenAI's own client, from an engine that says what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server import response_store
from pagoda_runtime.server.responses_answers import Response
from pagoda_runtime.server.testing import (
    READY,
    FakeEngine,
    make_config,
    make_state,
    running_server,
)

TOOL: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
THOUGHT_AND_CALL = f"<think>\nHm.</think>\n\nI add.\n{CALL}\0"


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine(make_config().engine, answer="It is 2.\0")
    engine.ready = msgspec.structs.replace(READY, max_model_len=4000, num_blocks=4000)
    return engine


@pytest_asyncio.fixture
async def url(engine: FakeEngine) -> AsyncIterator[str]:
    flags = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    config = make_config("--served-model-name", "tiny", *flags)
    async with running_server(make_state(engine, config)) as url:
        yield url


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url) as http:
        yield http


def prompt_of(engine: FakeEngine) -> list[str]:
    return bytes([*engine.prompts.values()][-1]).decode().strip().split("\n")


async def test_a_response_has_its_text_its_usage_and_what_was_asked(client, engine):
    response = await client.responses.create(
        model="tiny", input="1 + 1?", instructions="Be brief.", temperature=0.5, metadata={"a": "b"}
    )
    assert response.output_text == "It is 2."
    assert (response.status, response.object, response.model) == ("completed", "response", "tiny")
    assert (response.temperature, response.metadata) == (0.5, {"a": "b"})
    assert prompt_of(engine) == ["system: Be brief.", "user: 1 + 1?", "assistant:"]
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.output_tokens == len("It is 2.\0")
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_what_is_cut_off_is_incomplete(client):
    response = await client.responses.create(model="tiny", input="a", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    async with client.responses.stream(model="tiny", input="a", max_output_tokens=3) as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-2].item.status == "incomplete"


async def test_a_stream_has_all_its_events_in_order(client, engine):
    engine.answer = THOUGHT_AND_CALL.encode()
    stream = await client.responses.create(model="tiny", input="a", tools=[TOOL], stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    shown = [kind for kind, last in zip(kinds, [None, *kinds], strict=False) if kind != last]
    assert shown == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    # What is added is empty, and what comes then is all of it.
    added = [event for event in events if event.type.endswith(".added")]
    assert [event.part.text for event in added if event.type.endswith("part.added")] == ["", ""]
    assert added[-1].item.arguments == ""
    for kind, expected in (("reasoning", "Hm."), ("output", "I add.")):
        wanted = f"response.{kind}_text.delta"
        assert "".join(e.delta for e in events if e.type == wanted) == expected
    response = events[-1].response
    thought, message, call = response.output
    assert thought.content[0].text == "Hm."
    assert message.content[0].text == "I add."
    assert (call.name, call.arguments) == ("add", '{"a": "é"}')
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert items == response.output
    whole = await client.responses.create(model="tiny", input="a", tools=[TOOL])
    texts = [(i.type, i.status, getattr(i, "arguments", None)) for i in response.output]
    assert [(i.type, i.status, getattr(i, "arguments", None)) for i in whole.output] == texts


async def test_a_tool_loop_goes_on_from_the_response_before(client, engine):
    engine.answer = THOUGHT_AND_CALL.encode()
    first = await client.responses.create(model="tiny", input="1 + 2?", tools=[TOOL])
    call = first.output[-1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    engine.answer = b"It is 3.\0"
    fields: Any = {"model": "tiny", "tools": [TOOL]}
    second = await client.responses.create(
        input=[result], previous_response_id=first.id, instructions="s", **fields
    )
    assert second.output_text == "It is 3."
    lines = ["user: 1 + 2?", "assistant: I add.", "tool: 3", "assistant:"]
    assert prompt_of(engine) == ["system: s", *lines]
    # The same conversation, sent whole.
    items: Any = [{"role": "user", "content": "1 + 2?"}, *first.output, result]
    await client.responses.create(input=items, store=False, **fields)
    assert prompt_of(engine) == lines
    # Instructions are those of one request alone, and an older response can be gone on from again.
    await client.responses.create(input="And?", previous_response_id=second.id, **fields)
    assert prompt_of(engine) == [*lines[:3], "assistant: It is 3.", "user: And?", "assistant:"]
    await client.responses.create(input=[result], previous_response_id=first.id, **fields)
    assert prompt_of(engine) == lines


async def test_a_response_is_remembered_until_it_is_deleted(client, http):
    response = await client.responses.create(model="tiny", input="a")
    assert await client.responses.retrieve(response.id) == response
    await client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id):
        await client.responses.retrieve(response.id)
    unstored = await client.responses.create(model="tiny", input="a", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(unstored.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="tiny", input="a", previous_response_id=unstored.id)
    assert caught.value.param == "previous_response_id"
    streamed = await client.responses.create(model="tiny", input="a", stream=True)
    *_, last = [event async for event in streamed]
    assert await client.responses.retrieve(last.response.id) == last.response
    answer = (await http.get(f"/v1/responses/{last.response.id}")).json()
    assert msgspec.to_builtins(msgspec.convert(answer, Response)) == answer


async def test_the_oldest_responses_are_forgotten(client, monkeypatch):
    monkeypatch.setattr(response_store, "MAX_RESPONSES", 2)
    first, second, third = [
        await client.responses.create(model="tiny", input="a") for _ in range(3)
    ]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)
    monkeypatch.setattr(response_store, "MAX_BYTES", 200)
    await client.responses.create(model="tiny", input="b" * 100)
    for gone in (second, third):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(gone.id)


async def test_metrics_have_a_label_for_each_route_and_none_for_an_id(http):
    for method, path in (("GET", "a"), ("GET", "b"), ("POST", "a/cancel")):
        assert (await http.request(method, f"/v1/responses/{path}")).status_code == 404
    metrics = (await http.get("/metrics")).text
    one = 'http_requests_total{handler="/v1/responses/{response_id}%s",method="%s",status="4xx"} %s'
    assert one % ("", "GET", "2.0") in metrics
    assert one % ("/cancel", "POST", "1.0") in metrics


async def wait_for(client: openai.AsyncOpenAI, response_id: str, status: str) -> Any:
    for _ in range(500):
        response = await client.responses.retrieve(response_id)
        if response.status == status:
            return response
        await asyncio.sleep(0.005)
    raise AssertionError(f"it never is {status}, but {response.status}")


async def test_a_response_in_the_background_is_made_cancelled_and_gone_on_from(client, engine):
    engine.step_seconds = 0.002
    begun = await client.responses.create(model="tiny", input="a", background=True)
    assert (begun.status, begun.output) == ("in_progress", [])
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        await client.responses.create(model="tiny", input="b", previous_response_id=begun.id)
    done = await wait_for(client, begun.id, "completed")
    assert done.output_text == "It is 2."
    await client.responses.create(model="tiny", input="b", previous_response_id=begun.id)
    assert prompt_of(engine) == ["user: a", "assistant: It is 2.", "user: b", "assistant:"]
    engine.answer = b"for ever "
    endless = await client.responses.create(model="tiny", input="a", background=True)
    await asyncio.sleep(0.05)
    cancelled = await client.responses.cancel(endless.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output_text.startswith("for ever")
    assert not engine.running
    plain = await client.responses.create(model="tiny", input="a", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(plain.id)


async def test_a_failure_is_told_in_the_stream_and_in_the_background(client, engine):
    # The one in the background has some 2 s to go when the engine fails.
    engine.answer, engine.step_seconds = b"a", 0.02
    begun = await client.responses.create(model="tiny", input="a", background=True)
    stream = await client.responses.create(model="tiny", input="a", stream=True)
    events = []
    async for event in stream:
        events.append(event)
        engine.failure = EngineFailed(reason="RankDied", message="gone")
    assert (events[-2].type, events[-2].message) == ("error", "gone")
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert events[-1].response.error.code == "engine_dead"
    while engine.running:
        await asyncio.sleep(0.005)
    engine.failure = None
    failed = await wait_for(client, begun.id, "failed")
    assert failed.error.message == "gone"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "an add"}]}, "tools[0].function.name"),
        ({"reasoning": {"effort": "most"}}, "reasoning_effort"),
        ({"temperature": 9}, "temperature"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
async def test_what_is_wrong_or_not_served_is_named(http, fields, param):
    answer = await http.post("/v1/responses", json={"input": "a", **fields})
    assert answer.status_code == (404 if "previous_response_id" in fields else 400), answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
