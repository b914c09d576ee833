"""The bodies of answers of /v1/messages, as Anthropic has them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(Struct, frozen=True, tag_field="type", tag="text"):
    """What the model said."""

    text: str


class ThinkingBlock(Struct, frozen=True, tag_field="type", tag="thinking"):
    """What the model thought; the signature is empty."""

    thinking: str
    signature: str


class ToolUseBlock(Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Struct, frozen=True):
    """input_tokens are those that were not in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Struct, frozen=True, tag_field="type", tag="message"):
    """The answer of POST /v1/messages; stop_reason is null in the first event of a stream."""

    id: str
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class CountedTokens(Struct, frozen=True):
    """The tokens of a conversation, those of tools and of the system included."""

    input_tokens: int


class AnthropicErrorDetails(Struct, frozen=True):
    """What was wrong."""

    type: str
    message: str


class AnthropicError(Struct, frozen=True, tag_field="type", tag="error"):
    """The body of every answer below /v1/messages from status 400 on."""

    error: AnthropicErrorDetails
