"""An answer as a row of blocks (thoughts, text, calls), as Anthropic's and OpenAI's newer forms
have it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from msgspec.json import encode

from pagoda_runtime.parsing.deltas import (
    CallArguments,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
)
from pagoda_runtime.server.answer import Answer, TypedDelta, typed_deltas

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One block: its text, or a call's arguments as JSON."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Change(NamedTuple):
    """What happened to a block."""

    what: Literal["start", "text", "stop"]
    block: Block
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """The blocks of one answer; only the last one is open."""

    blocks: list[Block] = field(default_factory=list)
    is_open: bool = False
    last: TypedDelta | None = None
    """That with which the answer ended, while it goes on the latest."""

    async def collect(self, answer: Answer) -> None:
        """Take all of an answer of which nobody needs to hear before its end."""
        async for _ in self.stream(answer, lambda change: b""):
            pass

    async def stream(
        self, answer: Answer, write: Callable[[Change], bytes]
    ) -> AsyncGenerator[bytes, None]:
        """What `write` makes of each change, asked while the block is as the change says."""
        async with aclosing(typed_deltas(answer)) as deltas:
            async for delta in deltas:
                if events := b"".join(map(write, self.take(delta.parts))):
                    yield events
                # Only what is still open then is what it ended with.
                self.last = delta
        if events := b"".join(map(write, self.finish())):
            yield events

    def take(self, deltas: Sequence[Delta]) -> Iterator[Change]:
        for delta in deltas:
            match delta:
                case ReasoningDelta(text):
                    yield from self._write("reasoning", text)
                case ContentDelta(text):
                    yield from self._write("text", text)
                case CallStart(_, call_id, name):
                    yield from self._start("call", call_id, name)
                case CallArguments(_, text):
                    yield from self._append(text)

    def finish(self) -> Iterator[Change]:
        """The end of the open block."""
        if self.is_open:
            self.is_open = False
            yield Change("stop", self.blocks[-1])

    def _write(self, kind: Literal["reasoning", "text"], text: str) -> Iterator[Change]:
        if not self.is_open or self.blocks[-1].kind != kind:
            yield from self._start(kind)
        yield from self._append(text)

    def _start(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Change]:
        yield from self.finish()
        self.is_open = True
        self.blocks.append(Block(kind, len(self.blocks), call_id, name))
        yield Change("start", self.blocks[-1])

    def _append(self, text: str) -> Iterator[Change]:
        self.blocks[-1].texts.append(text)
        yield Change("text", self.blocks[-1], text)


def write_event(kind: str, **fields: Any) -> bytes:
    """A server-sent event whose data repeats its kind."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))
