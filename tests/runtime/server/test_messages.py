"""/v1/messages through Anthropic's own client, from an engine that says what a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import msgspec
import pytest
import pytest_asyncio

from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server.messages_answers import AnthropicError, Message
from pagoda_runtime.server.testing import (
    READY,
    FakeEngine,
    make_config,
    make_state,
    running_server,
)

USER: Any = {"role": "user", "content": "1 + 1?"}
TOOL: Any = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
THOUGHT_AND_CALL = f"<think>\nHm.</think>\n\nI add.\n{CALL}\0"


@pytest.fixture
def engine() -> FakeEngine:
    config = make_config()
    engine = FakeEngine(config.engine, answer="It is 2.\0")
    engine.ready = msgspec.structs.replace(READY, max_model_len=4000, num_blocks=4000)
    return engine


@pytest_asyncio.fixture
async def url(engine: FakeEngine) -> AsyncIterator[str]:
    flags = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    config = make_config("--served-model-name", "tiny", "--api-key", "k", *flags)
    async with running_server(make_state(engine, config)) as url:
        yield url


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
        yield client


def prompt_of(engine: FakeEngine) -> str:
    return bytes([*engine.prompts.values()][-1]).decode()


async def create(client: anthropic.AsyncAnthropic, **fields: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 200, "messages": [USER], **fields}
    return await client.messages.create(**body)


async def test_an_answer_has_its_text_its_end_and_its_tokens(client, engine):
    message = await create(client, system=[{"type": "text", "text": "Be brief."}])
    assert [block.text for block in message.content] == ["It is 2."]
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "end_turn")
    assert message.id.startswith("msg_")
    usage = message.usage
    prompt = prompt_of(engine)
    assert prompt == "\nsystem: Be brief.\nuser: 1 + 1?\nassistant:"
    assert usage.cache_read_input_tokens == 4
    assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt)
    assert usage.output_tokens == len("It is 2.\0")


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["is", "never"]}, "stop_sequence", "is"),
    ],
)
async def test_the_end_of_an_answer_has_its_cause(client, fields, reason, sequence):
    for is_stream in (False, True):
        if is_stream:
            body = {"model": "tiny", "max_tokens": 200, "messages": [USER], **fields}
            async with client.messages.stream(**body) as stream:
                message = await stream.get_final_message()
        else:
            message = await create(client, **fields)
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
        assert message.content[0].text == "It "


async def test_a_stream_has_all_its_events_and_ends_as_the_answer_in_one_piece(client, engine):
    engine.answer = THOUGHT_AND_CALL.encode()
    whole = await create(client, tools=[TOOL])
    body: Any = {"model": "tiny", "max_tokens": 200, "messages": [USER], "tools": [TOOL]}
    kinds = []
    async with client.messages.stream(**body) as stream:
        async for event in stream:
            if not kinds or kinds[-1] != event.type:
                kinds.append(event.type)
        streamed = await stream.get_final_message()
    block = ["content_block_start", "content_block_delta"]
    thinking = ["content_block_start", "thinking"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert {*block, *thinking, "text", "input_json", "signature"} <= set(kinds)
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    for message in (whole, streamed):
        thought, text, call = message.content
        assert (thought.thinking, text.text) == ("Hm.", "I add.")
        assert (call.name, call.input) == ("add", {"a": "é"})
        assert message.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0


async def test_a_stream_is_named_events_without_openais_end(url):
    body = {"max_tokens": 3, "messages": [USER], "stream": True}
    async with httpx.AsyncClient(base_url=url, headers={"x-api-key": "k"}) as http:
        text = (await http.post("/v1/messages", json=body)).text
    kinds = [line.removeprefix("event: ") for line in text.split("\n") if line[:6] == "event:"]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-1] == "message_stop"
    assert "[DONE]" not in text


async def test_a_tool_loop_sends_calls_thoughts_and_results_back(client, engine):
    engine.answer = THOUGHT_AND_CALL.encode()
    first = await create(client, tools=[TOOL], tool_choice={"type": "auto"})
    call = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    engine.answer = b"It is 3.\0"
    turn: Any = [
        USER,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
    ]
    second = await create(client, messages=turn, tools=[TOOL])
    assert second.content[0].text == "It is 3."
    lines = ["user: 1 + 1?", "assistant: I add.", "tool: 3", "user: Go on.", "assistant:"]
    assert prompt_of(engine).strip().split("\n") == lines


async def test_the_last_words_of_the_assistant_are_gone_on_with(client, engine):
    await create(client, messages=[USER, {"role": "assistant", "content": "It"}])
    assert prompt_of(engine).endswith("user: 1 + 1?\nassistant: It\n")


async def test_tokens_are_counted_as_the_prompt_has_them(client, engine):
    counted = await client.messages.count_tokens(model="tiny", messages=[USER], system="s")
    await create(client, system="s")
    assert counted.input_tokens == len(prompt_of(engine))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "other"}, "other"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "no"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "sub"),
        ({"tools": [{**TOOL, "name": "an add"}]}, "'an add'"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 100_000}, "100000"),
    ],
)
async def test_what_is_wrong_is_told_in_anthropics_form(url, fields, words):
    body = {"model": "tiny", "max_tokens": 5, "messages": [USER], **fields}
    headers = {"x-api-key": "k"}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        answer = await http.post("/v1/messages", json=body)
    assert answer.status_code == (404 if "model" in fields else 400)
    error = msgspec.convert(answer.json(), AnthropicError)
    assert words in error.error.message
    kind = "not_found_error" if "model" in fields else "invalid_request_error"
    assert error.error.type == kind


async def test_a_key_may_come_in_either_header_and_errors_keep_their_form(url):
    async with httpx.AsyncClient(base_url=url) as http:
        refused = await http.post("/v1/messages", json={})
        assert (refused.status_code, refused.json()["error"]["type"]) == (
            401,
            "authentication_error",
        )
        for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
            missing = await http.post("/v1/messages", json={}, headers=headers)
            assert missing.json()["type"] == "error"
            assert "max_tokens" in missing.json()["error"]["message"]
        wrong = {"x-api-key": "k", "authorization": "Bearer wrong"}
        assert (await http.post("/v1/messages", json={}, headers=wrong)).status_code == 401
        lost = await http.get("/v1/messages/batches", headers={"x-api-key": "k"})
        assert lost.json()["error"]["type"] == "not_found_error"


async def test_an_answer_is_what_the_document_says(url):
    body = {"max_tokens": 5, "messages": [USER]}
    async with httpx.AsyncClient(base_url=url, headers={"x-api-key": "k"}) as http:
        answer = (await http.post("/v1/messages", json=body)).json()
    assert msgspec.to_builtins(msgspec.convert(answer, Message)) == answer


async def test_a_stream_that_fails_ends_with_an_error(client, engine):
    engine.answer, engine.step_seconds = b"a", 0.001
    stream = await create(client, stream=True, max_tokens=3000)

    async def read() -> None:
        async for _ in stream:
            engine.failure = EngineFailed(reason="RankDied", message="gone")

    with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as caught:
        await read()
    assert "gone" in str(caught.value)
