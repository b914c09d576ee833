"""The input of a batch: one request per line, each read and judged by itself."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec


@dataclass(frozen=True, slots=True)
class Line:
    """A request: body is the JSON text that is posted to url."""

    number: int
    """Of the line in the file, from 1."""
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request."""

    number: int
    custom_id: str | None
    """None if the line has none, or if an earlier line has the same one."""
    code: str
    message: str


def read_lines(
    file: BinaryIO, urls: Collection[str], max_line_bytes: int
) -> Iterator[Line | BadLine]:
    """Every line of the file but blank ones; one line at a time is in memory.

    Args:
        urls: what a line may ask for.
        max_line_bytes: a longer line is a bad one.
    """
    number = 0
    custom_ids: set[str] = set()
    while raw := file.readline(max_line_bytes + 1):
        number += 1
        if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
            while (rest := file.readline(max_line_bytes)) and not rest.endswith(b"\n"):
                pass
            message = f"The line is longer than {max_line_bytes} bytes."
            yield BadLine(number, None, "line_too_long", message)
        elif raw.strip():
            line = parse_line(number, raw, urls)
            if line.custom_id in custom_ids:
                message = f"custom_id {line.custom_id!r} is that of an earlier line."
                line = BadLine(number, None, "duplicate_custom_id", message)
            elif line.custom_id is not None:
                custom_ids.add(line.custom_id)
            yield line


def parse_line(number: int, raw: bytes, urls: Collection[str]) -> Line | BadLine:
    """One line: {"custom_id": …, "method": "POST", "url": one of urls, "body": {…}}."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return BadLine(number, None, "invalid_json", f"The line is no JSON object: {error}.")
    values: dict[str, str | None] = {}
    for name, is_right, expected in (
        ("custom_id", lambda v: isinstance(v, str) and v != "", "a string that is not empty"),
        ("method", lambda v: v == "POST", "POST"),
        ("url", lambda v: v in urls, f"one of {', '.join(urls)}"),
    ):
        value = msgspec.json.decode(fields[name]) if name in fields else None
        if not is_right(value):
            shown = f"{value!r:.100}" if name in fields else "missing"
            message = f"{name} is {shown}; it must be {expected}."
            return BadLine(number, values.get("custom_id"), "invalid_line", message)
        values[name] = value
    custom_id, url = values["custom_id"], values["url"]
    assert custom_id is not None
    assert url is not None
    body = bytes(fields.get("body", b""))
    problem = _find_problem(body)
    if problem is not None:
        return BadLine(number, custom_id, "invalid_line", problem)
    return Line(number, custom_id, url, body)


class _Streamed(msgspec.Struct):
    stream: Any = None


def _find_problem(body: bytes) -> str | None:
    """What a batch cannot do with a body; its other fields are the server's to judge."""
    if not body.startswith(b"{"):
        return "body must be an object, with the fields of a request."
    try:
        streamed = msgspec.json.decode(body, type=_Streamed).stream
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"body is no JSON object: {error}."
    if streamed:
        return f"body.stream is {streamed!r:.100}; it must be false or absent in a batch."
    return None


def pending(
    lines: Iterator[Line | BadLine], done_ids: Container[str], done_numbers: Container[int]
) -> Iterator[Line | BadLine]:
    """The lines that have no result yet."""
    for line in lines:
        if line.custom_id is None:
            is_done = line.number in done_numbers
        else:
            is_done = line.custom_id in done_ids
        if not is_done:
            yield line
