"""Values that are not written as JSON, as JSON: Python's literals, Gemma's, and plain text.

What comes is converted as it comes, and always alike: a value that is JSON already stays as it is.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pagoda_runtime.parsing.scanner import Emit, Reading, Scanner

# Of references to references; one to itself means nothing.
MAX_REFERENCES = 16
WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {
    **{"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "/": "/"},
    **{
        "\\": "\\\\",
        '"': '\\"',
        "'": "'",
        "\n": "",
        "0": "\\u0000",
        "a": "\\u0007",
        "v": "\\u000b",
    },
}
_NUM_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class Style(NamedTuple):
    """How values are written."""

    quotes: tuple[str, ...]
    """Each ends the string that it begins; of two, the one that begins with the other is first."""
    has_escapes: bool
    word: str
    """The characters of a number or a word, as a regular expression has them."""


PYTHON = Style(('"""', "'''", '"', "'"), True, r"[-+.\w]")
GEMMA = Style(('<|"|>', "<escape>"), False, r"[^,{}\[\]:]")


def read_value(scanner: Scanner, emit: Emit, style: Style) -> Reading[None]:
    """Emit the next value as JSON. Raises CutOff; Malformed where none begins."""
    yield from scanner.space()
    if quote := (yield from scanner.take(*style.quotes)):
        yield from _read_string(scanner, emit, quote, style)
    elif opener := (yield from scanner.take("{", "[", "(")):
        yield from _read_items(scanner, emit, opener, style)
    else:
        emit(to_json((yield from _read_word(scanner, style))))


def _read_items(scanner: Scanner, emit: Emit, opener: str, style: Style) -> Reading[None]:
    begin, end = ("{", "}") if opener == "{" else ("[", "]")
    emit(begin)
    is_first = True
    while True:
        yield from scanner.space()
        if (yield from scanner.take("}", "]", ")")):
            emit(end)
            return
        if not (yield from scanner.peek()):
            yield from scanner.fail()
        if not is_first:
            emit(", ")
        is_first = False
        if begin == "{":
            yield from _read_key(scanner, emit, style)
        yield from read_value(scanner, emit, style)
        yield from scanner.space()
        # Without one, the next round finds the end, or that this is no list.
        yield from scanner.take(",")


def _read_key(scanner: Scanner, emit: Emit, style: Style) -> Reading[None]:
    if quote := (yield from scanner.take(*style.quotes)):
        yield from _read_string(scanner, emit, quote, style)
    else:
        emit(json.dumps((yield from _read_word(scanner, style)), ensure_ascii=False))
    yield from scanner.space()
    yield from scanner.expect(":")
    emit(": ")


def _read_word(scanner: Scanner, style: Style) -> Reading[str]:
    word = (yield from scanner.span(style.word)).strip()
    # At the end of the text it may have gone on.
    if not word or not (yield from scanner.peek()):
        yield from scanner.fail()
    return word


def _read_string(scanner: Scanner, emit: Emit, quote: str, style: Style) -> Reading[None]:
    emit('"')
    markers = (quote, "\\") if style.has_escapes else (quote,)
    while (yield from scanner.through(markers, lambda text: emit(escaped(text)))) == "\\":
        character = yield from scanner.peek()
        if not character:
            yield from scanner.fail()
        yield from scanner.take(character)
        if num_digits := _NUM_HEX_DIGITS.get(character):
            digits = ""
            while len(digits) < num_digits:
                digit = yield from scanner.expect(*"0123456789abcdefABCDEF")
                digits += digit
            # Halves of a pair come one behind the other, and JSON has them so too.
            emit(f"\\u{digits:0>4}" if num_digits < 8 else escaped(_character(digits)))
        else:
            emit(_ESCAPES.get(character, escaped("\\" + character)))
    emit('"')


def _character(digits: str) -> str:
    number = int(digits, 16)
    return chr(number) if number < 0x110000 else "\N{REPLACEMENT CHARACTER}"


def escaped(text: str) -> str:
    """A text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _refuse(word: str) -> None:
    # NaN and the infinities, which Python takes for JSON.
    raise ValueError(word)


def to_json(text: str) -> str:
    """A value without quotes as JSON: itself if it is JSON, Python's words and numbers, else a
    string."""
    if text in WORDS:
        return WORDS[text]
    try:
        json.loads(text, parse_constant=_refuse)
        return text
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text)
        if isinstance(value, (int, float, list, dict, tuple, str)):
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    return json.dumps(text, ensure_ascii=False)


def resolve(root: Mapping[str, Any], schema: Any) -> Any:
    """The schema that a reference within the root means."""
    found: Any = schema
    for _ in range(MAX_REFERENCES):
        reference = found.get("$ref") if isinstance(found, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        found = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


def types_of(schema: Any) -> frozenset[str]:
    """The types that a schema names, or those of its alternatives; none: it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset({named})
    if isinstance(named, list):
        return frozenset(map(str, named))
    if isinstance(values := schema.get("enum"), list):
        return frozenset({"string"} if all(isinstance(v, str) for v in values) else ())
    parts = schema.get("anyOf") or schema.get("oneOf") or ()
    return frozenset().union(*map(types_of, parts)) if isinstance(parts, list) else frozenset()


def read_text_value(
    scanner: Scanner, emit: Emit, ends: tuple[str, ...], schema: Any
) -> Reading[None]:
    """Emit a value that is written without quotes, up to one of the ends, as the schema has it.

    A string is streamed. What may be something else is converted when all of it is there.
    Raises: CutOff.
    """
    types = types_of(schema)
    if types == {"string"}:
        emit('"')
        yield from scanner.through(ends, lambda text: emit(escaped(text)))
        emit('"')
        return
    text = yield from scanner.text_through(*ends)
    if "string" in types and not (text.strip() == "null" and "null" in types):
        emit(json.dumps(text, ensure_ascii=False))
    else:
        emit(to_json(text.strip()) if text.strip() else '""')
