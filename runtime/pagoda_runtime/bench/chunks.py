"""The chunks of a stream of OpenAI's API: what of them the benchmark and `pagoda chat` read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pagoda_runtime.bench.http1 import BrokenAnswer, ConnectionLost, EventParser, NoAnswer

MAX_SHOWN_CHARACTERS = 300


class ErrorEvent(NoAnswer):
    """The stream carried an error in place of its rest."""

    kind = "error event"


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another server's name of reasoning_content."""
    tool_calls: list[Call] | None = None

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.thoughts)))


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(Chunk)


class ChunkReader:
    """Reads the chunks of one stream."""

    def __init__(self) -> None:
        self._events = EventParser()
        self._is_done = False

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """The chunks that these bytes complete. Raises ErrorEvent or BrokenAnswer."""
        for data in self._events.feed(piece):
            if data == b"[DONE]":
                self._is_done = True
                continue
            try:
                chunk = _decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BrokenAnswer(f"an event is no chunk: {error}") from error
            if chunk.error is not None:
                raise ErrorEvent(show_error(data))
            yield chunk

    def finish(self) -> None:
        """Raise ConnectionLost, unless the stream said that this is its end."""
        if not self._is_done:
            raise ConnectionLost("the stream ended without [DONE]")


def show_error(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the beginning of whatever it is."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        message = body.decode(errors="replace")
    return str(message)[:MAX_SHOWN_CHARACTERS]
