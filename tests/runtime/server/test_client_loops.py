"""Anthropic's client, and OpenAI's with responses, against a tiny random model: grammars make it
call tools and keep to schemas, whatever it would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer
from pagoda_runtime.server.testing_process import serving

TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }} in "
    "<tool_call>{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FLAGS = ["--kv-cache-memory-bytes", "8000000", "--max-num-seqs", "8"]
FLAGS += ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]


class Add(BaseModel):
    """Add two numbers."""

    # Else any other field fits, and a random model writes them until it is cut off.
    model_config = ConfigDict(extra="forbid")

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)
    sign: Literal["+", "-"]


class Verdict(BaseModel):
    """Without ranges: Anthropic's client takes them out of a schema before it is sent."""

    model_config = ConfigDict(extra="forbid")

    sign: Literal["+", "-"]
    is_right: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    write_tiny_tokenizer(folder, TEMPLATE)
    with serving(folder, *FLAGS) as url:
        yield url


def test_anthropics_client_thinks_calls_and_answers(url):
    tool: Any = {"name": "add", "input_schema": Add.model_json_schema()}
    fields: Any = {"model": "tiny", "max_tokens": 200, "tools": [tool]}
    messages: list[Any] = [{"role": "user", "content": "7 + 5?"}]
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        with client.messages.stream(
            messages=messages,
            tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
            thinking={"type": "enabled", "budget_tokens": 12},
            **fields,
        ) as stream:
            first = stream.get_final_message()
        assert [block.type for block in first.content] == ["thinking", "tool_use"]
        assert first.stop_reason == "tool_use"
        call = first.content[-1]
        given = Add.model_validate(call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": str(given.a + given.b)}
        messages += [{"role": "assistant", "content": first.content}]
        messages += [{"role": "user", "content": [result]}]
        second = client.messages.create(messages=messages, **{**fields, "max_tokens": 5})
        assert second.stop_reason in ("max_tokens", "end_turn")
        parsed = client.messages.parse(
            model="tiny", max_tokens=200, messages=messages[:1], output_format=Verdict
        )
        assert isinstance(parsed.parsed_output, Verdict)


def test_openais_client_calls_parses_and_goes_on_by_responses(url):
    tool: Any = openai.pydantic_function_tool(Add, name="add")["function"]
    fields: Any = {"model": "tiny", "max_output_tokens": 200}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        first = client.responses.create(
            input="7 + 5?",
            tools=[{"type": "function", **tool}],
            tool_choice={"type": "function", "name": "add"},
            parallel_tool_calls=False,
            **fields,
        )
        (call,) = first.output
        assert call.type == "function_call"
        given = Add.model_validate(json.loads(call.arguments))
        result: Any = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": str(given.a + given.b),
        }
        second = client.responses.parse(
            input=[result], previous_response_id=first.id, text_format=Add, **fields
        )
        assert isinstance(second.output_parsed, Add)
        with client.responses.stream(input="And?", text_format=Add, **fields) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert isinstance(final.output_parsed, Add)
        assert {"response.output_text.delta", "response.completed"} <= kinds
