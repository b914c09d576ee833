"""The body of POST /v1/messages, Anthropic's form of a chat, as the chat that it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.chat_protocol import (
    MAX_MESSAGES,
    ChatCompletionRequest,
    to_call,
    to_tool,
)
from pagoda_runtime.server.errors import validate
from pagoda_runtime.server.protocol import Body, Part, Phrase, Small, Text, TextOr, only


class TextBlockParam(Part):
    """Text of a message, of the system or of a tool's result."""

    type: Literal["text"]
    text: Text


class ThinkingBlockParam(Part):
    """What the model thought in an earlier answer; its signature is not looked at."""

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlockParam(Part):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]


class ToolResultBlockParam(Part):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | list[TextBlockParam] | None = None


Block = Annotated[
    Annotated[
        TextBlockParam | ThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam,
        Field(discriminator="type"),
    ],
    only(
        "blocks of text, thinking, tool_use and tool_result",
        *("text", "thinking", "tool_use", "tool_result"),
    ),
]


class MessageParam(Part):
    """One message; the results of tools stand in those of the user."""

    role: Literal["user", "assistant"]
    content: TextOr[Block]


class MessageTool(Part):
    """A tool that the model may call; tools that Anthropic's own servers run are not served."""

    type: Literal["custom"] | None = None
    name: Text
    description: Text | None = None
    parameters: Annotated[dict[str, Any], Field(alias="input_schema")]
    strict: bool | None = None


class MessageToolChoice(Part):
    """Which tools have to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    """Whether the model thinks before it answers, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class OutputFormat(Part):
    """The JSON schema of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Part):
    """The form of the answer."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh"] | None = None


class CountTokensRequest(Body):
    """The body of POST /v1/messages/count_tokens."""

    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: Text | list[TextBlockParam] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same conversation as a body of /v1/chat/completions."""
        messages = [{"role": "system", "content": _to_text(self.system)}] if self.system else []
        for message in self.messages:
            messages += _to_messages(message)
        tools = [to_tool(tool) for tool in self.tools or ()]
        fields: dict[str, Any] = {"model": self.model, "messages": messages, "tools": tools or None}
        if messages[-1]["role"] == "assistant":
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.tool_choice is not None:
            fields |= _to_tool_choice(self.tool_choice)
        if self.thinking is not None:
            is_on = self.thinking.type != "disabled"
            fields["chat_template_kwargs"] = {"enable_thinking": is_on, "thinking": is_on}
            fields["thinking_token_budget"] = self.thinking.budget_tokens
        return validate(ChatCompletionRequest.model_validate, {**fields, **self._other_fields()})

    def _other_fields(self) -> dict[str, Any]:
        return {}


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: Small
    stream: bool | None = None
    stop_sequences: Annotated[list[Phrase], Field(fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Small | None = None
    output_config: OutputConfig | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def _other_fields(self) -> dict[str, Any]:
        config = self.output_config or OutputConfig()
        fields: dict[str, Any] = {
            "stream": self.stream,
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "reasoning_effort": config.effort,
        }
        if config.format is not None:
            schema = {"name": "answer", "schema": config.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


def _to_text(content: str | Sequence[TextBlockParam] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _to_messages(message: MessageParam) -> list[dict[str, Any]]:
    """One message; the results of tools are messages of their own, before the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, parts, calls, thoughts = [], [], [], []
    for block in message.content:
        match block:
            case TextBlockParam():
                parts.append({"type": "text", "text": block.text})
            case ThinkingBlockParam():
                thoughts.append(block.thinking)
            case ToolUseBlockParam():
                arguments = json.dumps(block.input, ensure_ascii=False)
                calls.append(to_call(block.id, block.name, arguments))
            case ToolResultBlockParam():
                result = {"role": "tool", "content": _to_text(block.content)}
                results.append({**result, "tool_call_id": block.tool_use_id})
    own: dict[str, Any] = {"role": message.role, "content": parts or None}
    if message.role == "user" and (calls or thoughts):
        raise RequestError(
            "A message of the user has no tool_use and no thinking; those are the assistant's.",
            param="messages",
        )
    own |= {"tool_calls": calls} if calls else {}
    own |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return results if results and not parts else [*results, own]


def _to_tool_choice(choice: MessageToolChoice) -> dict[str, Any]:
    words: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    words["tool"] = {"type": "function", "function": {"name": choice.name}}
    fields = {"tool_choice": words[choice.type]}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields
