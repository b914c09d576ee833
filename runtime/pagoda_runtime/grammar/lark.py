"""A grammar in llguidance's form of Lark, written rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

ANY_TEXT = r"/(?s:.*)/"
SOME_TEXT = r"/(?s:.+)/"
# As models saw JSON: what Python writes. Else a weak one may write white space for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Lark:
    """A grammar in the making.

    Args:
        special: tokens whose text is not written letter by letter, with their ids.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special
        self._names: dict[tuple[str, str], str] = {}

    def literal(self, text: str) -> str:
        """The text as an expression; special tokens in it by their ids."""
        if not self.special:
            return quoted(text)
        pattern = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = filter(None, re.split(f"({pattern})", text))
        return " ".join(f"<[{self.special[p]}]>" if p in self.special else quoted(p) for p in parts)

    def rule(self, body: str, options: str = "") -> str:
        """The name of a rule of its own."""
        return self._names.setdefault((body, options), f"r{len(self._names)}")

    def json(self, schema: Schema, *, is_strict: bool) -> str:
        """A value of this schema. Without strict, keywords that cannot be enforced are not."""
        guidance = {**_SPACING, **({} if is_strict else {"lenient": True})}
        return self.rule(f"%json {json.dumps({'x-guidance': guidance, **schema})}")

    def text_until(self, end: str, pattern: str = ANY_TEXT, max_tokens: int | None = None) -> str:
        """Any text, and the end, which is forced after max_tokens."""
        bound = "" if max_tokens is None else f"max_tokens={max_tokens}"
        begin = min((end.find(token) for token in self.special if token in end), default=-1)
        if begin >= 0:
            text = self.rule(pattern, f"[{bound}]" if bound else "")
            return f"{text} {self.literal(end[begin:])}"
        options = f"suffix={quoted(end)}"
        if not bound:
            return self.rule(pattern, f"[{options}]")
        # What is forced comes first: of two that may end here, llguidance goes on with the first.
        forced = f"{self.rule(pattern, f'[{bound}]')} {self.literal(end)}"
        return f"({forced} | {self.rule(pattern, f'[{options}, {bound}]')})"

    def render(self, start: str) -> str:
        rules = [f"{name}{options}: {body}" for (body, options), name in self._names.items()]
        return "\n".join([f"start: {start}", *rules]) + "\n"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
