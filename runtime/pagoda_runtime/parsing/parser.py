"""One answer of a model, read as it comes: pieces of text in, typed deltas out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagoda_runtime.parsing.calls import Source, Tools
from pagoda_runtime.parsing.deltas import Delta, Sink, drop
from pagoda_runtime.parsing.formats import (
    HARMONY,
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
)
from pagoda_runtime.parsing.harmony import read_harmony
from pagoda_runtime.parsing.scanner import CutOff, Malformed, Reading, Scanner


@dataclass(frozen=True, slots=True)
class Layout:
    """What is looked for in an answer.

    Args:
        tools: the row of TOOL_FORMATS, None where no calls are read.
        reasoning: the row of REASONING_FORMATS, None where thoughts are text like any other.
        is_thinking: whether the prompt ends within the model's thoughts.
    """

    tools: str | None = None
    reasoning: str | None = None
    is_thinking: bool = False
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the tools' arguments, by name."""
    max_calls: int | None = None

    @property
    def is_harmony(self) -> bool:
        return HARMONY in (self.tools, self.reasoning)


class AnswerParser:
    """Reads one answer. How its text was cut into pieces makes no difference.

    Args:
        make_id: a new id for a call.
    """

    def __init__(self, layout: Layout, make_id: Callable[[], str]) -> None:
        self._scanner = Scanner()
        self._sink = Sink(make_id, layout.max_calls)
        self._reading: Reading[None] | None = _read_all(self._scanner, self._sink, layout)
        self._go_on()

    @property
    def is_reasoning(self) -> bool:
        """Whether the last words were thoughts."""
        return self._sink.is_reasoning

    @property
    def has_calls(self) -> bool:
        return self._sink.num_calls > 0 or self._sink.in_call

    def push(self, text: str) -> list[Delta]:
        """What is certain now."""
        self._scanner.push(text)
        self._go_on()
        return self._take()

    def finish(self, *, is_cut: bool = False) -> list[Delta]:
        """No more text comes: what was held back.

        The markup of an unfinished call is dropped, and what may be the beginning of one if the
        answer was cut off (is_cut).
        """
        self._scanner.is_over, self._scanner.is_cut = True, is_cut
        self._go_on()
        self._sink.finish()
        return self._take()

    def _go_on(self) -> None:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None

    def _take(self) -> list[Delta]:
        deltas, self._sink.deltas = self._sink.deltas, []
        return deltas


def _read_all(scanner: Scanner, sink: Sink, layout: Layout) -> Reading[None]:
    try:
        if layout.is_harmony:
            yield from read_harmony(scanner, sink)
            return
        dropped: tuple[str, ...] = ()
        if layout.reasoning is not None:
            row = REASONING_FORMATS[layout.reasoning]
            dropped = row.dropped
            yield from _read_thoughts(scanner, sink, row, layout.is_thinking)
        tools = None if layout.tools is None else TOOL_FORMATS[layout.tools]
        yield from _read_answer(scanner, sink, tools, layout.schemas, dropped)
    except CutOff:
        scanner.skip()


def _read_thoughts(
    scanner: Scanner, sink: Sink, row: ReasoningFormat, is_thinking: bool
) -> Reading[None]:
    """What stands at the beginning between the row's marks; the prompt may have the first one."""
    space = yield from scanner.space()
    if (yield from scanner.take(row.begin)) or is_thinking:
        if (yield from scanner.until((row.end,), sink.reasoning)):
            sink.end_reasoning()
    else:
        sink.content(space)


def _read_answer(
    scanner: Scanner, sink: Sink, row: ToolFormat | None, tools: Tools, dropped: tuple[str, ...]
) -> Reading[None]:
    """Content and calls, to the end."""
    openers = () if row is None else row.openers
    if row is not None and row.bare:
        space = yield from scanner.space()
        if (yield from scanner.peek()) == row.bare:
            yield from _read_calls(scanner, sink, row, tools, "")
        else:
            sink.content(space)
    if not openers and not dropped:
        yield from scanner.rest(sink.content)
        return
    while marker := (yield from scanner.until((*openers, *dropped), sink.content)):
        if row is not None and marker in openers:
            yield from _read_calls(scanner, sink, row, tools, marker)


def _read_calls(
    scanner: Scanner, sink: Sink, row: ToolFormat, tools: Tools, opener: str
) -> Reading[None]:
    """The calls behind an opener. What turns out to be none is content, marks and all."""
    num_before = sink.num_calls
    scanner.mark(len(opener))
    try:
        yield from row.read(Source(scanner, sink, tools, opener, row.closers))
    except Malformed:
        if not sink.in_call and sink.num_calls == num_before:
            sink.content(scanner.since_mark())
        else:
            sink.end()
            if row.closers:
                yield from scanner.until(row.closers, drop)
            else:
                yield from scanner.rest(drop)
    except CutOff:
        scanner.skip()
        is_begun = sink.in_call or sink.num_calls != num_before
        if not opener and not is_begun and not scanner.is_cut:
            sink.content(scanner.since_mark())
    scanner.unmark()
