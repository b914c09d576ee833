"""The parts of an answer as OpenAI's chat completions have them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from pagoda_runtime.parsing.deltas import (
    CallArguments,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
    WholeMessage,
)
from pagoda_runtime.server import answers


def write_message(message: WholeMessage) -> answers.AssistantMessage:
    calls = [
        answers.ToolCall(call.id, answers.FunctionCall(call.name, call.arguments))
        for call in message.calls
    ]
    return answers.AssistantMessage(
        message.content or (None if calls else ""), None, message.reasoning or UNSET, calls or UNSET
    )


def write_delta(parts: Sequence[Delta]) -> answers.Delta:
    """All parts in one chunk."""
    content = "".join(part.text for part in parts if isinstance(part, ContentDelta))
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningDelta))
    calls: dict[int, answers.ToolCallDelta] = {}
    for part in parts:
        if isinstance(part, CallStart):
            function = answers.FunctionCallDelta("", part.name)
            calls[part.index] = answers.ToolCallDelta(part.index, function, part.id, "function")
        elif isinstance(part, CallArguments):
            begun = calls.get(part.index)
            if begun is None:
                function = answers.FunctionCallDelta(part.text)
                calls[part.index] = answers.ToolCallDelta(part.index, function)
            else:
                text = begun.function.arguments + part.text
                function = answers.FunctionCallDelta(text, begun.function.name)
                calls[part.index] = answers.ToolCallDelta(
                    part.index, function, begun.id, begun.type
                )
    return answers.Delta(UNSET, content or UNSET, reasoning or UNSET, list(calls.values()) or UNSET)
