"""Readers of calls: how each kind of format is read, from behind the marker that begins it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pagoda_runtime.parsing.deltas import Sink, drop
from pagoda_runtime.parsing.literals import (
    GEMMA,
    PYTHON,
    WORDS,
    read_text_value,
    read_value,
    resolve,
)
from pagoda_runtime.parsing.scanner import Malformed, Reading, Scanner

Tools = Mapping[str, Mapping[str, Any]]
"""The schema of each tool's arguments, by its name."""

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("type", "id", "name", *_ARGUMENTS)
_NAME = r"[\w.-]"


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's properties, with what their references mean."""
    found = schema.get("properties")
    if not isinstance(found, Mapping):
        return {}
    return {key: resolve(schema, part) for key, part in found.items()}


class Source(NamedTuple):
    """What a reader reads from and writes to."""

    scanner: Scanner
    sink: Sink
    tools: Tools
    opener: str
    """The marker that was read; "" where the answer itself begins as a call."""
    closers: tuple[str, ...]
    """Markers that end the calls behind it, if the format has them."""

    def start(self, name: str) -> None:
        """A call begins. Raises Malformed for a name that cannot be one, and without a marker for
        one that is no tool's: then the answer is an answer."""
        if not name or not (self.opener or name in self.tools):
            raise Malformed
        self.sink.start(name)
        self.scanner.unmark()

    def properties(self, name: str) -> Mapping[str, Any]:
        return properties_of(self.tools.get(name, {}))


def read_json(source: Source) -> Reading[None]:
    """`{"name": …, "arguments": …}`, several of them behind each other or in a list."""
    scanner, ends = source.scanner, (*source.closers, source.opener)
    while True:
        yield from scanner.space()
        if (yield from scanner.take("[")):
            while not (yield from _takes(scanner, "]")):
                yield from _read_object(source)
                yield from _takes(scanner, ",")
        else:
            yield from _read_object(source)
            while (yield from _takes(scanner, ";")) or (yield from scanner.peek()) == "{":
                yield from _read_object(source)
        # Some models forget the closer before the next opener.
        if not source.closers or (yield from scanner.until(ends, drop)) != source.opener:
            return


def _takes(scanner: Scanner, separator: str) -> Reading[bool]:
    yield from scanner.space()
    return bool((yield from scanner.take(separator)))


def _read_object(source: Source) -> Reading[None]:
    scanner, sink = source.scanner, source.sink
    early: list[str] = []
    yield from scanner.space()
    yield from scanner.expect("{")
    while not (yield from _takes(scanner, "}")):
        key = yield from scanner.json_string()
        if not source.opener and key not in _KEYS:
            raise Malformed
        yield from scanner.space()
        yield from scanner.expect(":")
        yield from scanner.space()
        if key == "name" and not sink.in_call:
            source.start((yield from scanner.json_string()))
            sink.arguments("".join(early))
        elif key in _ARGUMENTS:
            yield from _read_json_arguments(source, early)
        else:
            yield from scanner.json_value(drop)
        yield from _takes(scanner, ",")
    if not sink.in_call:
        raise Malformed
    sink.end()


def _read_json_arguments(source: Source, early: list[str]) -> Reading[None]:
    """Those before the name are kept until it is known. Some models write JSON within a string."""
    emit = source.sink.arguments if source.sink.in_call else early.append
    first = yield from source.scanner.peek()
    if first == '"':
        emit((yield from source.scanner.json_string()))
    else:
        yield from source.scanner.json_value(drop if first == "n" else emit)


def read_mistral(source: Source) -> Reading[None]:
    """A list of objects, or `name[ARGS]{…}`, which may have an id between the two."""
    scanner = source.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) in ("[", "{"):
        yield from read_json(source)
        return
    name = yield from scanner.span(_NAME)
    if (yield from scanner.expect("[ARGS]", "[CALL_ID]", "{")) == "[CALL_ID]":
        yield from scanner.text_through("[ARGS]")
    source.start(name)
    yield from scanner.space()
    yield from scanner.json_value(source.sink.arguments)
    source.sink.end()


def read_deepseek(source: Source) -> Reading[None]:
    """`name<sep>{…}`, or `function<sep>name` and a fenced block, each between marks of its own."""
    scanner = source.scanner
    while True:
        yield from scanner.space()
        if (yield from scanner.expect(DEEPSEEK_CALL, DEEPSEEK_ALL_END)) == DEEPSEEK_ALL_END:
            return
        name = yield from scanner.text_through(DEEPSEEK_SEPARATOR)
        yield from scanner.space()
        if (yield from scanner.peek()) != "{":
            name = yield from scanner.text_through("\n")
            yield from scanner.space()
            yield from scanner.take("```json", "```")
            yield from scanner.space()
        source.start(name.strip())
        yield from scanner.json_value(source.sink.arguments)
        yield from scanner.through((DEEPSEEK_END,), drop)
        source.sink.end()


DEEPSEEK_ALL = "<｜tool▁calls▁begin｜>"
DEEPSEEK_ALL_END = "<｜tool▁calls▁end｜>"
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
DEEPSEEK_END = "<｜tool▁call▁end｜>"


class Tags(NamedTuple):
    """Marks around the names and the values of arguments."""

    name: str
    """Before the name of the tool, behind the marker; may be empty."""
    name_ends: tuple[str, ...]
    key: str
    key_end: str
    value: str
    """Between the name of an argument and its value, behind key_end."""
    value_ends: tuple[str, ...]
    """The first is how it is written; others are taken too."""
    end: str
    """Of the call."""
    all_end: str


QWEN_TAGS = Tags(
    name="<function=",
    name_ends=(">",),
    key="<parameter=",
    key_end=">",
    value="\n",
    value_ends=("\n</parameter>", "</parameter>"),
    end="</function>",
    all_end="</tool_call>",
)
GLM_TAGS = Tags(
    name="",
    name_ends=("\n", "<arg_key>", "</tool_call>"),
    key="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_ends=("</arg_value>",),
    end="</tool_call>",
    all_end="",
)


def read_tagged(source: Source, tags: Tags) -> Reading[None]:
    """A call whose values stand between tags, as plain text or as JSON by their types."""
    scanner, sink = source.scanner, source.sink
    yield from scanner.space()
    if tags.name and source.opener != tags.name:
        yield from scanner.expect(tags.name)
    pieces: list[str] = []
    marker = yield from scanner.through(tags.name_ends, pieces.append)
    name = "".join(pieces).strip()
    if not name or len(name.split()) > 1 or (not tags.name and name.startswith(("{", "["))):
        raise Malformed
    source.start(name)
    properties, separator = source.properties(name), "{"
    if marker not in (tags.key, tags.end):
        marker = yield from scanner.through((tags.key, tags.end), drop)
    while marker == tags.key:
        key = (yield from scanner.text_through(tags.key_end)).strip()
        sink.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        if tags.value.isspace():
            yield from scanner.take(tags.value)
        else:
            yield from scanner.through((tags.value,), drop)
        yield from read_text_value(scanner, sink.arguments, tags.value_ends, properties.get(key))
        separator = ", "
        marker = yield from scanner.through((tags.key, tags.end), drop)
    if separator == ", ":
        sink.arguments("}")
    source.sink.end()
    if tags.all_end:
        yield from scanner.space()
        yield from scanner.take(tags.all_end)


def read_python(source: Source) -> Reading[None]:
    """`[f(a=1, b="x"), g()]`"""
    scanner = source.scanner
    yield from scanner.space()
    yield from scanner.expect("[")
    while not (yield from _takes(scanner, "]")):
        name = yield from scanner.span(_NAME)
        yield from scanner.expect("(")
        source.start(name)
        yield from _read_python_arguments(source, list(source.properties(name)))
        source.sink.end()
        yield from _takes(scanner, ",")
    if source.closers:
        yield from scanner.until(source.closers, drop)


def _read_python_arguments(source: Source, names: list[str]) -> Reading[None]:
    """Those without a name have the names of the tool's properties, in order."""
    scanner, emit = source.scanner, source.sink.arguments
    num_read = 0
    while not (yield from _takes(scanner, ")")):
        word = ""
        if (yield from scanner.peek()).isidentifier():
            word = yield from scanner.span(_NAME)
            yield from scanner.space()
        if not (yield from scanner.peek()):
            yield from scanner.fail()
        is_named = bool(word) and bool((yield from scanner.take("=")))
        key = word if is_named else names[num_read] if num_read < len(names) else f"arg{num_read}"
        emit(f"{', ' if num_read else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        num_read += 1
        if word and not is_named:
            emit(WORDS.get(word, json.dumps(word)))
        else:
            yield from read_value(scanner, emit, PYTHON)
        yield from scanner.space()
        yield from scanner.take(",")
    if num_read:
        emit("}")


def read_gemma(source: Source) -> Reading[None]:
    """`call:name{key:value,…}`, strings between quotes that are tokens."""
    scanner = source.scanner
    yield from scanner.space()
    yield from scanner.expect("call:")
    name = yield from scanner.span(_NAME)
    if (yield from scanner.peek()) != "{":
        yield from scanner.fail()
    source.start(name)
    yield from read_value(scanner, source.sink.arguments, GEMMA)
    yield from scanner.through(source.closers, drop)
    source.sink.end()
