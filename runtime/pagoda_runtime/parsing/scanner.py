"""A text that comes in pieces, read as if all of it were there.

What reads it is a generator, which yields wherever it needs more text. So a format is read by plain
code from left to right, and how the text was cut into pieces makes no difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

from pagoda_runtime.tokenizer.detokenizer import find_beginning

T = TypeVar("T")
Reading = Generator[None, None, T]
Emit = Callable[[str], None]

_OUTSIDE_STRING = re.compile(r'["{}\[\]]')
_INSIDE_STRING = re.compile(r'["\\]')


class CutOff(Exception):
    """The text ended within something."""


class Malformed(Exception):
    """The text is not what its beginning said."""


class Scanner:
    """The text and how far it is read."""

    def __init__(self) -> None:
        self.is_over = False
        """Whether no more text comes."""
        self.is_cut = False
        """Whether more would have come."""
        self._text = ""
        self._at = 0
        self._mark: int | None = None

    def push(self, text: str) -> None:
        kept = self._at if self._mark is None else self._mark
        self._text = self._text[kept:] + text
        self._at -= kept
        self._mark = None if self._mark is None else 0

    def mark(self, num_back: int = 0) -> None:
        """Remember this place, or one so many characters before it."""
        self._mark = self._at - num_back

    def unmark(self) -> None:
        self._mark = None

    def since_mark(self) -> str:
        """The text from the mark to here; nothing is marked any more."""
        begin, self._mark = self._mark, None
        return "" if begin is None else self._text[begin : self._at]

    def skip(self) -> None:
        """Take all that is there."""
        self._at = len(self._text)

    def peek(self) -> Reading[str]:
        """The next character, not taken; "" at the end."""
        while self._at == len(self._text) and not self.is_over:
            yield
        return self._text[self._at : self._at + 1]

    def take(self, *options: str) -> Reading[str]:
        """Take the first of the options that the text goes on with; "" if it is none of them.

        Raises: CutOff within one of them.
        """
        longest = max(map(len, options))
        while True:
            rest = self._text[self._at : self._at + longest]
            for option in options:
                if rest.startswith(option):
                    self._at += len(option)
                    return option
                if option.startswith(rest):
                    if not self.is_over:
                        break
                    if rest and self.is_cut:
                        raise CutOff
            else:
                return ""
            yield

    def expect(self, *options: str) -> Reading[str]:
        """The same. Raises CutOff, Malformed."""
        found = yield from self.take(*options)
        if not found:
            yield from self.fail(*options)
        return found

    def fail(self, *options: str) -> Reading[None]:
        """Raise CutOff at the end of the text, or within one of the options, else Malformed."""
        yield from self.peek()
        rest = self._text[self._at :]
        is_cut = not rest or any(option.startswith(rest) for option in options)
        raise CutOff if is_cut else Malformed

    def span(self, characters: str) -> Reading[str]:
        """Take all characters of a class, as a regular expression has it."""
        pattern, taken = _span(characters), ""
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None
            taken += found[0]
            self._at = found.end()
            if self._at < len(self._text) or self.is_over:
                return taken
            yield

    def space(self) -> Reading[str]:
        """Take white space."""
        return (yield from self.span(r"\s"))

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str]:
        """Emit the text before the first of the markers, and take the marker; "" at the end.

        What may be the beginning of a marker is held back until it is known, and dropped where
        the text was cut off.
        """
        pattern = _either(tuple(markers))
        while True:
            found = pattern.search(self._text, self._at)
            if found is not None:
                self._emit(found.start(), emit)
                self._at = found.end()
                return found[0]
            if self.is_over and not self.is_cut:
                self._emit(len(self._text), emit)
                return ""
            self._emit(find_beginning(self._text, markers, self._at), emit)
            if self.is_over:
                self.skip()
                return ""
            yield

    def rest(self, emit: Emit) -> Reading[None]:
        """Emit all that comes."""
        while True:
            self._emit(len(self._text), emit)
            if self.is_over:
                return
            yield

    def through(self, markers: Sequence[str], emit: Emit) -> Reading[str]:
        """The same. Raises CutOff if no marker comes."""
        marker = yield from self.until(markers, emit)
        if not marker:
            raise CutOff
        return marker

    def text_through(self, *markers: str) -> Reading[str]:
        """The text before the first of the markers, which is taken too. Raises CutOff."""
        pieces: list[str] = []
        yield from self.through(markers, pieces.append)
        return "".join(pieces)

    def json_value(self, emit: Emit) -> Reading[None]:
        """Emit one JSON value as it is written. Raises CutOff; Malformed where none begins."""
        first = yield from self.peek()
        if not first or first not in '"{[':
            word = yield from self.span(r"[-+.\w]")
            if not word:
                yield from self.fail()
            emit(word)
            return
        depth, in_string = 0, False
        while True:
            text, at, is_done = self._text, self._at, False
            while found := (_INSIDE_STRING if in_string else _OUTSIDE_STRING).search(text, at):
                at, character = found.end(), found[0]
                if character == "\\":
                    if at == len(text):
                        at -= 1
                        break
                    at += 1
                    continue
                if character == '"':
                    in_string = not in_string
                else:
                    depth += 1 if character in "{[" else -1
                if is_done := not in_string and depth == 0:
                    break
            else:
                at = len(text)
            self._emit(at, emit)
            if is_done:
                return
            if self.is_over:
                raise CutOff
            yield

    def json_string(self) -> Reading[str]:
        """The text of a JSON string. Raises CutOff, Malformed."""
        pieces: list[str] = []
        if (yield from self.peek()) != '"':
            yield from self.fail()
        yield from self.json_value(pieces.append)
        try:
            text = str(json.loads("".join(pieces), strict=False))
            # Half of a surrogate pair is no text.
            text.encode()
        except ValueError:
            raise Malformed from None
        return text

    def _emit(self, end: int, emit: Emit) -> None:
        if end > self._at:
            begin, self._at = self._at, end
            emit(self._text[begin:end])


@cache
def _either(markers: tuple[str, ...]) -> re.Pattern[str]:
    """One of few tuples: those of the formats."""
    return re.compile("|".join(map(re.escape, markers)))


@cache
def _span(characters: str) -> re.Pattern[str]:
    return re.compile(f"(?:{characters})*")
