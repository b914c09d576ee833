"""Tools and thoughts over real HTTP, from an engine that says what a test wants it to."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.server.testing import READY, FakeEngine, make_config, make_state, running_server
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "1 + 1?"}
ANSWER = (
    "<think>\nHm.</think>\n\nI add.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {"a":2}}\n</tool_call>'
)


class Server:
    """A server whose engine gives one answer to all."""

    def __init__(self, url: str, engine: FakeEngine) -> None:
        self.http = httpx.AsyncClient(base_url=url)
        self.engine = engine

    async def ask(self, answer: str = ANSWER, **fields: Any) -> httpx.Response:
        self.engine.answer = answer.encode() + b"\0"
        body = {"messages": [USER], "stop_token_ids": [0], "max_tokens": 400, **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def choice(self, answer: str = ANSWER, **fields: Any) -> dict[str, Any]:
        response = await self.ask(answer, **fields)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    async def refusal(self, **fields: Any) -> tuple[str, str]:
        """The param and the message of an answer with 400."""
        response = await self.ask(**fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        return error["param"], error["message"]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    config = make_config("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    engine = FakeEngine(config.engine)
    engine.ready = msgspec.structs.replace(READY, max_model_len=4000, num_blocks=4000)
    async with running_server(make_state(engine, config)) as url:
        server = Server(url, engine)
        async with server.http:
            yield server


async def test_thoughts_words_and_calls_are_told_apart(server):
    response = (await server.ask(tools=[TOOL])).json()
    (choice,) = response["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "I add.")
    calls = [(call["type"], call["function"]) for call in message["tool_calls"]]
    assert calls == [
        ("function", {"name": "add", "arguments": '{"a":1}'}),
        ("function", {"name": "add", "arguments": '{"a":2}'}),
    ]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    assert choice["finish_reason"] == "tool_calls"
    assert 0 < response["usage"]["completion_tokens_details"]["reasoning_tokens"] < 30


async def test_a_stream_has_the_same_parts_in_order(server):
    response = await server.ask(tools=[TOOL], stream=True)
    events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "I add."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    begun = [call for call in calls if "id" in call]
    assert [(call["index"], call["function"]["name"]) for call in begun] == [(0, "add"), (1, "add")]
    for index, written in enumerate(('{"a":1}', '{"a":2}')):
        parts = [call["function"]["arguments"] for call in calls if call["index"] == index]
        assert "".join(parts) == written
        assert len(parts) > 5
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


async def test_each_choice_is_read_for_itself(server):
    # The second choice begins a byte later in the answer: what it writes is no call.
    answer = '<tool_call>{"name": "add"}</tool_call>'
    response = (await server.ask(answer, tools=[TOOL], n=2, temperature=1)).json()
    first, second = response["choices"]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert first["message"]["content"] is None
    assert second["message"]["content"] == answer[1:]
    assert "tool_calls" not in second["message"]


async def test_without_tools_or_with_none_chosen_calls_are_words(server):
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}):
        choice = await server.choice(**fields)
        assert choice["message"]["content"].count("<tool_call>") == 2
        assert choice["finish_reason"] == "stop"


async def test_calls_end_after_the_first_if_they_may_not_be_parallel(server):
    choice = await server.choice(tools=[TOOL], parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1


async def test_thoughts_may_be_left_out(server):
    choice = await server.choice(include_reasoning=False, answer="<think>a</think>b")
    assert choice["message"] == {"role": "assistant", "content": "b", "refusal": None}


async def test_an_answer_that_is_cut_off_says_so(server):
    choice = await server.choice(tools=[TOOL], max_tokens=len(ANSWER) - 90)
    assert choice["finish_reason"] == "length"
    assert "<" not in choice["message"]["content"]


async def test_a_conversation_with_calls_and_their_results_comes_to_the_template(server):
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "two"}]},
    ]
    choice = await server.choice("It is two.", messages=history, tools=[TOOL])
    assert choice["message"]["content"] == "It is two."
    (prompt,) = server.engine.prompts.values()
    assert bytes(prompt).decode().splitlines()[-2] == "tool: two"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools[1].function.name", {"tools": [TOOL, TOOL]}),
        (
            "tools[0].function.name",
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        ),
        ("tools[0].type", {"tools": [{"type": "web_search", "function": {"name": "a"}}]}),
        (
            "tools[0].function.parameters.type",
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}
                ]
            },
        ),
        (
            "tools[0].function.parameters.required",
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"required": 1}}}
                ]
            },
        ),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "maybe"}),
        (
            "tool_choice.function.name",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        ),
        ("messages[0].tool_calls", {"messages": [{**USER, "tool_calls": [CALL]}]}),
        ("messages[0].tool_call_id", {"messages": [{**USER, "tool_call_id": "call_1"}]}),
        (
            "messages[1].tool_call_id",
            {"messages": [USER, {"role": "tool", "tool_call_id": "x", "content": "a"}]},
        ),
        ("messages[0].role", {"messages": [{"role": "wizard", "content": "a"}]}),
        (
            "messages[0].tool_calls[0].function.name",
            {
                "tools": [TOOL],
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{}"}}],
                    }
                ],
            },
        ),
        (
            "messages[0].tool_calls[0].function.arguments",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1"}}],
                    }
                ]
            },
        ),
        ("messages[0].content", {"messages": [{"role": "assistant", "tool_calls": []}]}),
        ("continue_final_message", {"continue_final_message": True}),
        ("chat_template", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs.tools", {"chat_template_kwargs": {"tools": []}}),
        ("reasoning_effort", {"reasoning_effort": "enormous"}),
        ("thinking_token_budget", {"thinking_token_budget": 0}),
    ],
)
async def test_what_cannot_be_is_refused_with_its_path(server, param, fields):
    found, message = await server.refusal(**fields)
    assert found == param
    assert param in message


async def test_a_model_without_known_formats_refuses_what_needs_them():
    state = make_state(FakeEngine(make_config().engine), make_config())
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        for field, value in (("tools", [TOOL]), ("thinking_token_budget", 5)):
            body = {"messages": [USER], field: value}
            answer = await http.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_marks_that_are_special_tokens_reach_the_reader_and_no_others_the_text(tmp_path):
    write_tiny_tokenizer(tmp_path, "[TOOL_CALLS][ARGS]{{ messages[0].content }}")
    path = tmp_path / "tokenizer_config.json"
    special = {"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<|other|>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | special))
    tokenizer = load_tokenizer(tmp_path)
    config = make_config()
    engine = FakeEngine(config.engine)
    engine.ready = msgspec.structs.replace(READY, vocab_size=300)
    text = '<|other|>Look.<|other|>[TOOL_CALLS]add[ARGS]{"a": 1}</s>'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert max(tokens) > 258
    engine.answer = tokens  # type: ignore[assignment]
    state = make_state(engine, config)
    state.tokenizer = tokenizer
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        body = {"messages": [USER], "tools": [TOOL], "stop_token_ids": [2]}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        plain = (await http.post("/v1/chat/completions", json=body | {"tools": []})).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "Look."
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    # Mistral's templates take ids of this form alone.
    assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])
    assert plain["choices"][0]["message"]["content"] == 'Look.add{"a": 1}'
