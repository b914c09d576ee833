"""OpenAI's client in a tool loop with a tiny random model, which a grammar makes call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer
from pagoda_runtime.server.testing_process import serving

TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }} in "
    '<tool_call>\n{"name"{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}'
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:"
    "<think>\n{% if enable_thinking is false %}</think>\n{% endif %}{% endif %}"
)
FLAGS = ["--kv-cache-memory-bytes", "8000000", "--max-num-seqs", "8"]
USER: Any = {"role": "user", "content": "7 + 5?"}


class Add(BaseModel):
    """Add two numbers."""

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)
    sign: Literal["+", "-"]


def no_thoughts(**fields: Any) -> dict[str, Any]:
    return {**fields, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    write_tiny_tokenizer(folder, TEMPLATE)
    with serving(folder, *FLAGS) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


TOOLS: Any = [openai.pydantic_function_tool(Add, name="add")]
SAMPLING: dict[str, Any] = {"model": "tiny", "temperature": 1, "max_tokens": 250}
ONE_CALL: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False, **SAMPLING}


def add(call: Any) -> Any:
    """Carry out a call: the message with its result."""
    given = Add.model_validate_json(call.function.arguments)
    result = given.a + given.b if given.sign == "+" else given.a - given.b
    return {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}


def test_a_tool_loop_thinks_calls_and_answers(client):
    messages = [USER]
    budget = {"thinking_token_budget": 12}
    first = client.chat.completions.create(
        messages=messages, tool_choice="required", extra_body=budget, **ONE_CALL
    )
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    details = first.usage and first.usage.completion_tokens_details
    assert details
    assert 0 < (details.reasoning_tokens or 0) <= 12 + len("</think>")
    calls = choice.message.tool_calls
    assert calls
    assert {call.function.name for call in calls} == {"add"}
    messages += [choice.message, *map(add, calls)]
    second = client.chat.completions.create(
        messages=messages, tools=TOOLS, extra_body=no_thoughts(), **{**SAMPLING, "max_tokens": 5}
    )
    assert second.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("n", [1, 3])
def test_forced_calls_stream_to_what_the_schema_says(client, n):
    named: Any = {"type": "function", "function": {"name": "add"}}
    with client.chat.completions.stream(
        messages=[USER],
        tool_choice=named,
        n=n,
        extra_body=no_thoughts(),
        **ONE_CALL,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert len(final.choices) == n
    for choice in final.choices:
        (call,) = choice.message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Add)
        assert choice.finish_reason == "tool_calls"


def test_parse_gives_the_arguments_as_objects(client):
    parsed = client.chat.completions.parse(
        messages=[USER], tool_choice="required", extra_body=no_thoughts(), **ONE_CALL
    )
    calls = parsed.choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Add) for call in calls)


async def test_the_asynchronous_client_streams_thoughts_and_calls(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.chat.completions.create(
            messages=[USER],
            tool_choice="required",
            stream=True,
            extra_body={"thinking_token_budget": 20},
            **ONE_CALL,
        )
        arguments, reasons = "", []
        async for chunk in stream:
            (choice,) = chunk.choices
            for call in choice.delta.tool_calls or ():
                if call.index == 0 and call.function:
                    arguments += call.function.arguments or ""
            reasons.append(choice.finish_reason)
    assert Add.model_validate_json(arguments)
    assert reasons[-1] == "tool_calls"


def test_a_structured_answer_comes_after_the_thoughts(client):
    answer = client.chat.completions.parse(
        messages=[USER],
        response_format=Add,
        extra_body={"thinking_token_budget": 10},
        **SAMPLING,
    )
    message = answer.choices[0].message
    assert isinstance(message.parsed, Add)
    assert answer.usage
    assert answer.usage.completion_tokens > len(message.content or "")


def test_a_strict_tool_and_a_structured_answer_may_both_come(client):
    for _ in range(3):
        parsed = client.chat.completions.parse(
            messages=[USER], response_format=Add, extra_body=no_thoughts(), **ONE_CALL
        )
        message = parsed.choices[0].message
        assert message.parsed or message.tool_calls


def test_a_last_message_is_continued(url):
    body = {
        **no_thoughts(model="tiny", max_tokens=3, temperature=0),
        "messages": [USER, {"role": "assistant", "content": "It is "}],
        "continue_final_message": True,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    prompt = "user: 7 + 5?\nassistant: It is"
    plain = {"model": "tiny", "max_tokens": 3, "temperature": 0, "prompt": list(prompt.encode())}
    ids = httpx.post(f"{url}/v1/completions", json={**plain, "prompt": prompt}).json()
    assert answer["usage"]["prompt_tokens"] == ids["usage"]["prompt_tokens"] - 1
    assert answer["choices"][0]["message"]["content"] is not None


def test_a_schema_that_is_none_fails_alone(client):
    bad: Any = {
        "type": "function",
        "function": {
            "name": "f",
            "strict": True,
            "parameters": {"properties": {"a": {"type": "x"}}},
        },
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            messages=[USER], tools=[bad], tool_choice="required", **SAMPLING
        )
    assert caught.value.param == "tools"
