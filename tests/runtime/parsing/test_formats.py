"""Calls in the format of each row: whole, streamed in every cut, broken off, and nearly right."""

from __future__ import annotations

import json
import random

import pytest
from written_answers import CALLS, MARKS, WRITERS, cuts, make_parser, read

from pagoda_runtime.parsing.deltas import CallStart
from pagoda_runtime.parsing.formats import HARMONY, REASONING_FORMATS, TOOL_FORMATS

CASES = [(row, case) for row in WRITERS for case in CALLS]


def test_every_row_has_a_writer():
    assert set(WRITERS) == set(TOOL_FORMATS)


@pytest.mark.parametrize(("row", "case"), CASES)
def test_calls_are_read_as_they_were_written(row, case):
    found = read([WRITERS[row](CALLS[case])], row)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == CALLS[case]
    assert (found.content, found.reasoning) == ("", "")
    assert [call.id for call in found.calls] == [f"id{n}" for n in range(len(CALLS[case]))]


@pytest.mark.parametrize(("row", "case"), CASES)
def test_how_an_answer_is_cut_into_pieces_makes_no_difference(row, case):
    text = WRITERS[row](CALLS[case])
    if not TOOL_FORMATS[row].bare and row != HARMONY:
        text = f"Let me see, 1 < 2 [x].\n\n{text}"
    whole = read([text], row)
    assert len(whole.calls) == len(CALLS[case])
    for pieces in cuts(text):
        assert read(pieces, row) == whole


@pytest.mark.parametrize("row", WRITERS)
def test_an_answer_that_breaks_off_anywhere_shows_no_marks(row):
    text = WRITERS[row](CALLS["several"])
    whole = read([text], row)
    for end in range(len(text)):
        found = read([text[:end]], row, is_cut=True)
        assert not any(mark in found.content for mark in MARKS[row])
        assert found.content == ""
        for call, complete in zip(found.calls, whole.calls, strict=False):
            assert call.name == complete.name
            assert complete.arguments.startswith(call.arguments) or call.arguments == "{}"


@pytest.mark.parametrize("row", [row for row in WRITERS if not TOOL_FORMATS[row].bare])
def test_text_around_calls_is_content_without_the_space_between(row):
    calls = WRITERS[row](CALLS["one"])
    text = f"Let me look.\n\n{calls}\n"
    if row == HARMONY:
        text = f"<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant{calls}"
    found = read([text], row)
    assert (found.content, len(found.calls)) == ("Let me look.", 1)


@pytest.mark.parametrize("row", WRITERS)
def test_an_answer_without_calls_is_content_to_the_last_space(row):
    for text in (
        "a < b [c](d) {e}\n ",
        "  two\n\nlines",
        '{"city": "Paris"}',
        "[1, 2]",
        "<",
        "x <tool",
    ):
        for pieces in ([text], list(text)):
            assert read(pieces, row).content == text


def test_arguments_are_streamed_as_they_come_and_as_they_are_written():
    written = '{"city" :"Par\\u0069s",\n "days":3 }'
    text = f'<tool_call>{{"name":"get_weather","arguments": {written}}}</tool_call>'
    parser = make_parser("hermes")
    seen = ""
    for end, letter in enumerate(text, start=1):
        for delta in parser.push(letter):
            seen += "" if isinstance(delta, CallStart) else delta.text  # type: ignore[union-attr]
        begin = text.index(written)
        if begin <= end <= begin + len(written):
            assert len(text[begin:end]) - len(seen) <= 1
    assert seen == written


@pytest.mark.parametrize(
    ("row", "text", "content"),
    [
        ("hermes", "Tags are <tool_call> and more.", "Tags are <tool_call> and more."),
        ("hermes", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
        ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}'),
        ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]"),
        ("pythonic", "[get_weather, now]", "[get_weather, now]"),
        ("qwen3_coder", "<tool_call>x</tool_call>", "<tool_call>x</tool_call>"),
        ("mistral", "[TOOL_CALLS] none at all", "[TOOL_CALLS] none at all"),
    ],
)
def test_what_only_looks_like_a_call_is_content(row, text, content):
    found = read(list(text), row)
    assert (found.content, found.calls) == (content, [])


@pytest.mark.parametrize(
    ("row", "text", "calls"),
    [
        # The closer is forgotten, a brace is missing or one is too many.
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "now"}</tool_call>',
            [("now", "{}"), ("now", "{}")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": 1}\n</tool_call> ok',
            [("now", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "now"}}</tool_call>', [("now", "{}")]),
        # Arguments before the name, as a text, or null.
        ("hermes", '<tool_call>{"arguments": {"a":1}, "name": "now"}', [("now", '{"a":1}')]),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
            [("now", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", "{}")]),
        ("granite", '<|tool_call|>{"name": "now", "arguments": {}}', [("now", "{}")]),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", [("now", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', [("now", "{}")]),
        ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', [("other", "{}")]),
        ("qwen3_coder", "<function=now>\n</function>", [("now", "{}")]),
        (
            "qwen3_coder",
            "<tool_call><function=get_weather><parameter=days>3</parameter>"
            "<parameter=city>3</parameter><parameter=new>[1]</parameter>"
            "<parameter=hourly>True</parameter><parameter=other>a b</parameter>"
            "</function></tool_call>",
            [
                (
                    "get_weather",
                    '{"days": 3, "city": "3", "new": [1], "hourly": true, "other": "a b"}',
                )
            ],
        ),
        (
            "glm45",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>x</arg_value></tool_call>",
            [("get_weather", '{"city": "x"}')],
        ),
        ("glm45", "<tool_call>now</tool_call>", [("now", "{}")]),
        (
            "pythonic",
            '[get_weather(\'it\\\'s\', 1_000, at={\'a\': (None, False)}, tags=["""x"""])]',
            [
                (
                    "get_weather",
                    '{"city": "it\'s", "days": 1000, "at": {"a": [null, false]}, "tags": ["x"]}',
                )
            ],
        ),
        (HARMONY, " to=functions.now<|channel|>commentary json<|message|>{}", [("now", "{}")]),
    ],
)
def test_what_models_write_beside_their_format_is_read_too(row, text, calls):
    for pieces in ([text], list(text)):
        found = read(pieces, row)
        assert [(call.name, call.arguments) for call in found.calls] == calls


def test_calls_beyond_those_that_are_wanted_are_left_out():
    text = WRITERS["hermes"](CALLS["several"])
    found = read(list(text), "hermes", max_calls=1)
    assert [call.name for call in found.calls] == ["get_weather"]
    assert found.content == ""


FRAGMENTS = (
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\n",
    ", ",
    ":",
    "name",
    '"name"',
    '"arguments": ',
    "now",
)
FRAGMENTS += (
    "get_weather",
    "(",
    ")",
    "=",
    "1",
    "True",
    "'",
    "<",
    "|",
    "é",
    "call:",
    "final",
    "x y",
)


@pytest.mark.parametrize("seed", range(300))
def test_any_text_is_read_and_alike_however_it_comes(seed):
    chance = random.Random(seed)
    row = chance.choice(list(TOOL_FORMATS))
    fields = {"reasoning": chance.choice([None, *REASONING_FORMATS]), "is_cut": seed % 2 == 0}
    parts = [chance.choice((*MARKS[row], *FRAGMENTS)) for _ in range(chance.randint(1, 25))]
    calls = WRITERS[row](CALLS["nested quotes"])
    text = calls[: chance.randint(0, len(calls))] + "".join(parts)
    whole = read([text], row, **fields)
    assert read(list(text), row, **fields) == whole
