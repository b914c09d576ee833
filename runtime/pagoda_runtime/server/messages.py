"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a chat."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.routing import Route

from pagoda_runtime.server.answer import Answer
from pagoda_runtime.server.blocks import Block, Blocks, Change, write_event
from pagoda_runtime.server.body import read_body
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import ApiError, to_anthropic
from pagoda_runtime.server.messages_answers import (
    CountedTokens,
    Message,
    MessageUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from pagoda_runtime.server.messages_protocol import CountTokensRequest, MessagesRequest
from pagoda_runtime.server.openai import Form, make_answer, make_creation
from pagoda_runtime.server.prompts import tokenize
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.unsupported import verify_supported

# The kinds of pieces and their fields, by the kind of a block.
_PIECES = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
_STOP_REASONS: dict[str, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}


def make_routes(state: ServerState) -> list[Route]:
    async def count_tokens(chat: ChatCompletionRequest, arrival: float) -> CountedTokens:
        (token_ids,) = await tokenize(state, chat)
        return CountedTokens(len(token_ids))

    read, read_to_count = (partial(_read, state, b) for b in (MessagesRequest, CountTokensRequest))
    return [
        make_creation(state, "/v1/messages", partial(Form, read, collect, stream, end)),
        make_answer(state, "/v1/messages/count_tokens", read_to_count, count_tokens),
    ]


async def _read(
    state: ServerState, body_class: type[CountTokensRequest], raw: bytes
) -> ChatCompletionRequest:
    body = await read_body(state, body_class, raw)
    chat = await state.parse(len(raw), body.to_chat)
    verify_supported(chat)
    return chat


async def collect(answer: Answer) -> Message:
    blocks = Blocks()
    await blocks.collect(answer)
    return _message(answer, blocks)


async def stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    blocks = Blocks()
    yield write_event("message_start", message=_message(answer, blocks)) + write_event("ping")
    async with aclosing(blocks.stream(answer, _write_change)) as events:
        async for event in events:
            yield event
    message = _message(answer, blocks)
    ending = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
    yield write_event("message_delta", delta=ending, usage=message.usage)
    yield write_event("message_stop")


def end(error: ApiError | None) -> bytes:
    return b"" if error is None else write_event("error", error=to_anthropic(error).error)


def _message(answer: Answer, blocks: Blocks) -> Message:
    """As it is after these blocks; with no reason to stop while it goes on."""
    usage = answer.usage()
    num_cached = usage.prompt_tokens_details.cached_tokens
    stop_reason: StopReason | None = None
    stop_sequence = None
    if (last := blocks.last) is not None and last.finish_reason is not None:
        stop_reason = _STOP_REASONS.get(last.finish_reason, "end_turn")
        if stop_reason == "end_turn" and isinstance(last.plain.stop_reason, str):
            stop_reason, stop_sequence = "stop_sequence", last.plain.stop_reason
    return Message(
        f"msg_{answer.id.rpartition('-')[2]}",
        "assistant",
        answer.model,
        [_write_block(block) for block in blocks.blocks],
        stop_reason,
        stop_sequence,
        MessageUsage(usage.prompt_tokens - num_cached, 0, num_cached, usage.completion_tokens),
    )


def _write_change(change: Change) -> bytes:
    block = change.block
    match change.what:
        case "start":
            begun = _write_block(block)
            return write_event("content_block_start", index=block.index, content_block=begun)
        case "text":
            kind, name = _PIECES[block.kind]
            piece = {"type": kind, name: change.text}
            return write_event("content_block_delta", index=block.index, delta=piece)
    signature = b""
    if block.kind == "reasoning":
        # Clients put it into the block, which they must send back whole.
        piece = {"type": "signature_delta", "signature": ""}
        signature = write_event("content_block_delta", index=block.index, delta=piece)
    return signature + write_event("content_block_stop", index=block.index)


def _write_block(block: Block) -> TextBlock | ThinkingBlock | ToolUseBlock:
    match block.kind:
        case "text":
            return TextBlock(block.text)
        case "reasoning":
            return ThinkingBlock(block.text, "")
    return ToolUseBlock(block.call_id, block.name, _read_arguments(block.text))


def _read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; none while it begins, and where it was cut off."""
    try:
        arguments = json.loads(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
