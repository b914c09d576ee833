"""An answer as a row of blocks (thoughts, text, calls), as Anthropic's and OpenAI's newer forms
have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pagoda_runtime.parsing.deltas import (
    CallArguments,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
)


@dataclass(slots=True)
class Block:
    """One block: its text, or a call's arguments as JSON."""

    kind: Literal["reasoning", "text", "call"]
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

    def add(self, deltas: Sequence[Delta]) -> None:
        """Take deltas of which nobody needs to hear."""
        for _ in self.take(deltas):
            pass

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

    def _start(
        self, kind: Literal["reasoning", "text", "call"], call_id: str = "", name: str = ""
    ) -> Iterator[Change]:
        yield from self.finish()
        self.is_open = True
        self.blocks.append(Block(kind, len(self.blocks), call_id, name))
        yield Change("start", self.blocks[-1])

    def _append(self, text: str) -> Iterator[Change]:
        self.blocks[-1].texts.append(text)
        yield Change("text", self.blocks[-1], text)
