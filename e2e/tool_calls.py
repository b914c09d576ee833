"""Calls of a tool, as an application makes them with OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
)
from pydantic import BaseModel, ConfigDict, Field

QUESTION: Any = {"role": "user", "content": "What is 17 plus 25?"}


class Add(BaseModel):
    """Add two numbers."""

    model_config = ConfigDict(extra="forbid")

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)


class Say(BaseModel):
    """Say something long."""

    text: str = Field(min_length=1000)


def _fields(model: str, tool: type[BaseModel], max_tokens: int) -> dict[str, Any]:
    """Of a request that must be answered with one call of this tool."""
    return {
        "model": model,
        "messages": [QUESTION],
        "tools": [openai.pydantic_function_tool(tool)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": max_tokens,
    }


def _only_call(message: ChatCompletionMessage) -> ChatCompletionMessageFunctionToolCall:
    (found,) = message.tool_calls or []
    assert isinstance(found, ChatCompletionMessageFunctionToolCall)
    return found


def call(client: openai.OpenAI, model: str) -> ChatCompletionMessage:
    """The message with a call of Add."""
    told: ChatCompletion = client.chat.completions.create(**_fields(model, Add, 64))
    assert told.choices[0].finish_reason == "tool_calls"
    return told.choices[0].message


def stream_call(client: openai.OpenAI, model: str) -> ChatCompletionMessage:
    """The same, put together from its parts; the arguments came in several."""
    with client.chat.completions.stream(**_fields(model, Add, 64)) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    assert choice.finish_reason == "tool_calls"
    return choice.message


def add(message: ChatCompletionMessage) -> dict[str, Any]:
    """Carry out the one call of a message: the message with its result."""
    found = _only_call(message)
    assert found.function.name == "Add"
    given = Add.model_validate_json(found.function.arguments)
    result = f"{given.a} + {given.b} = {given.a + given.b}"
    return {"role": "tool", "tool_call_id": found.id, "content": result}


def answer(client: openai.OpenAI, model: str, called: ChatCompletionMessage) -> str:
    """What the model says when it is told the result of its call."""
    messages: list[Any] = [QUESTION, called, add(called)]
    tools = [openai.pydantic_function_tool(Add)]
    told = client.chat.completions.create(
        model=model, messages=messages, tools=tools, temperature=0, max_tokens=8
    )
    return told.choices[0].message.content or ""


def call_until(client: openai.OpenAI, model: str, max_tokens: int) -> str:
    """A call that is cut off at so many tokens; its arguments as far as they came."""
    choice = client.chat.completions.create(**_fields(model, Say, max_tokens)).choices[0]
    assert choice.finish_reason == "length"
    return _only_call(choice.message).function.arguments
