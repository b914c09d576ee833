"""The parts of an answer, as they come: content, reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct


class ContentDelta(Struct, frozen=True):
    """More of what the user reads."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """More of what the model thinks."""

    text: str


class CallStart(Struct, frozen=True):
    """A call begins. index counts the calls of an answer."""

    index: int
    id: str
    name: str


class CallArguments(Struct, frozen=True):
    """More of a call's arguments: all of them together are a JSON text, unless it was cut off."""

    index: int
    text: str


Delta = ContentDelta | ReasoningDelta | CallStart | CallArguments


class Sink:
    """Collects the deltas of one answer.

    White space goes where nobody misses it: around reasoning, between an answer and its calls. So
    it is held back until it is known what follows.

    Args:
        make_id: a new id for a call.
        max_calls: of the answer; those behind are left out.
    """

    def __init__(self, make_id: Callable[[], str], max_calls: int | None) -> None:
        self.deltas: list[Delta] = []
        """New ones; who takes them empties the list."""
        self.num_calls = 0
        self.in_call = False
        self.is_reasoning = False
        self._make_id = make_id
        self._max_calls = max_calls
        self._strips = False
        """Whether white space before the next word is left out."""
        self._space = ""
        """White space that may have no word behind it."""
        self._has_arguments = False

    def content(self, text: str) -> None:
        if words := self._next_words(text):
            self.deltas.append(ContentDelta(words))

    def reasoning(self, text: str) -> None:
        if not self.is_reasoning:
            self.is_reasoning, self._space, self._strips = True, "", True
        if words := self._next_words(text):
            self.deltas.append(ReasoningDelta(words))

    def end_reasoning(self) -> None:
        """Then comes the answer, without the space between."""
        self.is_reasoning, self._space, self._strips = False, "", True

    def start(self, name: str) -> None:
        """A call of this tool begins."""
        self.in_call, self._has_arguments = True, False
        self._space, self._strips = "", True
        if not self._is_surplus:
            self.deltas.append(CallStart(self.num_calls, self._make_id(), name))

    def arguments(self, text: str) -> None:
        self._has_arguments = self._has_arguments or bool(text)
        if text and not self._is_surplus:
            self.deltas.append(CallArguments(self.num_calls, text))

    def end(self) -> None:
        """The call is complete, if one has begun."""
        if self.in_call:
            if not self._has_arguments:
                self.arguments("{}")
            self.in_call = False
            self.num_calls += not self._is_surplus

    def finish(self) -> None:
        """No more comes: white space at the end of plain content belongs to it."""
        if self._space and not self._strips and not self.is_reasoning:
            self.deltas.append(ContentDelta(self._space))
            self._space = ""

    @property
    def _is_surplus(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def _next_words(self, text: str) -> str:
        words = (self._space + text).rstrip()
        self._space = (self._space + text)[len(words) :]
        if self._strips:
            words = words.lstrip()
        self._strips = self._strips and not words
        return words


def drop(text: str) -> None:
    """Takes what stands for nothing."""


class Call(Struct):
    """A call of a tool; arguments are a JSON text."""

    id: str
    name: str
    arguments: str = ""


class WholeMessage(Struct):
    """An answer in one piece."""

    content: str
    reasoning: str
    calls: list[Call]

    @classmethod
    def join(cls, deltas: Iterable[Delta]) -> WholeMessage:
        content, reasoning, calls = [], [], []
        for delta in deltas:
            match delta:
                case ContentDelta(text=text):
                    content.append(text)
                case ReasoningDelta(text=text):
                    reasoning.append(text)
                case CallStart(id=call_id, name=name):
                    calls.append(Call(call_id, name))
                case CallArguments(index=index, text=text):
                    calls[index].arguments += text
        return cls("".join(content), "".join(reasoning), calls)
