"""What a batch reads: one line at a time, each judged by itself."""

from __future__ import annotations

import io
import json

import pytest

from pagoda_runtime.batch.lines import BadLine, Line, parse_line, pending, read_lines

URLS = ("/v1/completions", "/v1/chat/completions")
GOOD = {"custom_id": "a", "method": "POST", "url": URLS[0], "body": {"prompt": "x"}}


def read(text, max_line_bytes=1000):
    return list(read_lines(io.BytesIO(text), URLS, max_line_bytes))


def encode(**changes):
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def test_a_line_keeps_its_body_as_it_was_written():
    raw = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"x": 1.50,"x":2}}'
    assert parse_line(3, raw, URLS) == Line(3, "a", "/v1/completions", b'{"x": 1.50,"x":2}')


def test_blank_lines_are_passed_over_and_counted():
    lines = read(b"\n" + encode() + b"  \r\n" + encode(custom_id="b").rstrip())
    assert [(line.number, line.custom_id) for line in lines] == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("change", "code", "shown"),
    [
        ({"custom_id": 5}, "invalid_line", "custom_id is 5; it must be a string"),
        ({"custom_id": ""}, "invalid_line", "custom_id is ''"),
        ({"method": "GET"}, "invalid_line", "method is 'GET'; it must be POST"),
        ({"url": "/v1/models"}, "invalid_line", "url is '/v1/models'; it must be one of /v1/compl"),
        ({"url": ["/v1/completions"]}, "invalid_line", "url is ['/v1/completions']"),
        ({"body": "x"}, "invalid_line", "body must be an object"),
        ({"body": {"stream": True}}, "invalid_line", "body.stream is True; it must be false"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change, code, shown):
    (line,) = read(encode(**change))
    assert isinstance(line, BadLine)
    assert line.code == code
    assert shown in line.message


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field_is_named(name):
    (line,) = read(json.dumps({k: v for k, v in GOOD.items() if k != name}).encode())
    assert line.message.startswith(name)


@pytest.mark.parametrize("text", [b"{", b"[]", b"nonsense", b'{"custom_id":"a"}x', b"\xff\xfe{}"])
def test_what_is_no_json_object_is_a_bad_line_and_the_next_one_counts(text):
    bad, good = read(text + b"\n" + encode())
    assert (bad.number, bad.custom_id, bad.code) == (1, None, "invalid_json")
    assert isinstance(good, Line)


def test_a_second_line_with_the_same_custom_id_is_a_bad_one():
    first, second = read(encode() + encode())
    assert isinstance(first, Line)
    assert (second.number, second.custom_id, second.code) == (2, None, "duplicate_custom_id")
    assert "custom_id 'a'" in second.message


def test_a_line_that_is_too_long_is_passed_over_without_being_read_whole():
    long = encode(body={"prompt": "x" * 5000})
    lines = read(encode() + long + encode(custom_id="b") + long.rstrip())
    assert [getattr(line, "code", None) for line in lines] == [
        None,
        "line_too_long",
        None,
        "line_too_long",
    ]
    assert "1000 bytes" in lines[1].message
    assert len(read(encode(), max_line_bytes=len(encode()) - 1)) == 1


def test_what_has_a_result_is_not_pending():
    lines = read(encode() + b"{\n" + encode(custom_id="b") + b"[\n" + encode(custom_id="b"))
    left = list(pending(iter(lines), {"a"}, {2}))
    assert [line.number for line in left] == [3, 4, 5]
