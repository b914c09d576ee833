"""Answers in the format of each row: whole, streamed in every cut, and broken off."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pagoda_runtime.parsing.deltas import CallStart, Delta, WholeMessage
from pagoda_runtime.parsing.formats import HARMONY, REASONING_FORMATS, TOOL_FORMATS
from pagoda_runtime.parsing.parser import AnswerParser, Layout

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "at": {"type": "object"},
            "hourly": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
            "tags": {"type": "array"},
            "ratio": {"type": "number"},
        },
    },
    "now": {"type": "object", "properties": {}},
    "run.code-1": {"type": "object", "properties": {"source": {"type": "string"}}},
}
Calls = list[tuple[str, dict[str, Any]]]
CALLS: dict[str, Calls] = {
    "one": [("get_weather", {"city": "Paris", "days": 3})],
    "nested quotes": [
        ("get_weather", {"city": "a \"b' {c} [d], e", "at": {"x": ['"', "\\", {"y": "}"}]}}),
    ],
    "unicode": [("get_weather", {"city": "Zürich 東京 🌧️", "note": "é\n\ttab"})],
    "several": [
        ("get_weather", {"city": "Rome", "hourly": True, "ratio": -1.5e-3}),
        ("now", {}),
        ("run.code-1", {"source": "for i in range(3):\n    print(f'{i} < 2 </b>')\n"}),
    ],
    "values": [
        ("get_weather", {"city": "", "days": 0, "hourly": False, "note": None, "tags": [1, [], {}]})
    ],
}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [f'{{"name": {as_json(name)}, "{key}": {as_json(given)}}}' for name, given in calls]


def tagged(calls: Calls, begin: str, key: str, value_end: str, end: str) -> str:
    texts = []
    for name, given in calls:
        text = begin.format(name)
        for argument, value in given.items():
            written = value if isinstance(value, str) else as_json(value)
            text += key.format(argument) + written + value_end
        texts.append(text + end)
    return "\n".join(texts)


def gemma_value(value: Any) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{k}:{gemma_value(v)}" for k, v in value.items()) + "}"
        case list():
            return f"[{','.join(map(gemma_value, value))}]"
        case _:
            return as_json(value)


def python_call(name: str, given: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def deepseek(calls: Calls, head: str, tail: str) -> str:
    written = "".join(
        f"<｜tool▁call▁begin｜>{head.format(name)}{as_json(given)}{tail}<｜tool▁call▁end｜>"
        for name, given in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


WRITERS: dict[str, Callable[[Calls], str]] = {
    HARMONY: lambda calls: "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{as_json(given)}<|call|>"
        for name, given in calls
    ),
    "gemma4": lambda calls: "".join(
        f"<|tool_call>call:{name}{gemma_value(given)}<tool_call|>" for name, given in calls
    ),
    "functiongemma": lambda calls: "".join(
        f"<start_function_call>call:{name}{gemma_value(given)}<end_function_call>".replace(
            '<|"|>', "<escape>"
        )
        for name, given in calls
    ),
    "deepseek_v3": lambda calls: deepseek(calls, "function<｜tool▁sep｜>{}\n```json\n", "\n```"),
    "deepseek_v31": lambda calls: deepseek(calls, "{}<｜tool▁sep｜>", ""),
    "mistral": lambda calls: "".join(
        f"[TOOL_CALLS]{name}[ARGS]{as_json(given)}" for name, given in calls
    ),
    "mistral_json": lambda calls: f"[TOOL_CALLS] [{', '.join(objects(calls))}]",
    "glm45": lambda calls: tagged(
        calls,
        "<tool_call>{}\n",
        "<arg_key>{}</arg_key>\n<arg_value>",
        "</arg_value>\n",
        "</tool_call>",
    ),
    "qwen3_coder": lambda calls: tagged(
        calls,
        "<tool_call>\n<function={}>\n",
        "<parameter={}>\n",
        "\n</parameter>\n",
        "</function>\n</tool_call>",
    ),
    "granite": lambda calls: f"<|tool_call|>[{', '.join(objects(calls))}]",
    "hermes": lambda calls: "\n".join(
        f"<tool_call>\n{call}\n</tool_call>" for call in objects(calls)
    ),
    "lfm2": lambda calls: (
        "<|tool_call_start|>["
        + ", ".join(itertools.starmap(python_call, calls))
        + "]<|tool_call_end|>"
    ),
    "pythonic": lambda calls: f"[{', '.join(itertools.starmap(python_call, calls))}]",
    "llama3_json": lambda calls: "; ".join(objects(calls, "parameters")),
}
MARKS = {
    name: [
        *row.openers,
        *row.closers,
        *row.marks,
        "<parameter",
        "</",
        "[ARGS]",
        "<｜tool",
        "```json",
    ]
    for name, row in TOOL_FORMATS.items()
}
CASES = [(row, case) for row in WRITERS for case in CALLS]


def make_parser(row: str | None, **fields: Any) -> AnswerParser:
    numbers = itertools.count()
    layout = Layout(tools=row, schemas=SCHEMAS, **fields)
    return AnswerParser(layout, lambda: f"id{next(numbers)}")


def read(pieces: Sequence[str], row: str | None, *, is_cut: bool = False, **fields: Any) -> Any:
    parser = make_parser(row, **fields)
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push(piece)
    return WholeMessage.join([*deltas, *parser.finish(is_cut=is_cut)])


def cuts(text: str) -> list[list[str]]:
    """Every way to cut it into pieces of one length up to 3, and some at random."""
    ways = []
    for size in (1, 2, 3):
        for first in range(size):
            edges = [0, *range(first, len(text), size), len(text)]
            ways.append([text[a:b] for a, b in itertools.pairwise(edges)])
    for seed in range(3):
        chance, pieces, at = random.Random(seed), [], 0
        while at < len(text):
            pieces.append(text[at : at + chance.randint(1, 3)])
            at += len(pieces[-1])
        ways.append(pieces)
    return ways


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


THOUGHTS = [name for name in REASONING_FORMATS if name != HARMONY]


@pytest.mark.parametrize("row", THOUGHTS)
@pytest.mark.parametrize("is_thinking", [False, True])
def test_thoughts_are_split_from_the_answer(row, is_thinking):
    marks = REASONING_FORMATS[row]
    text = f"{'' if is_thinking else marks.begin}\nHm, a < b?\n\nYes.\n{marks.end}\n\nIt is.\n"
    whole = read([text], None, reasoning=row, is_thinking=is_thinking)
    assert (whole.reasoning, whole.content) == ("Hm, a < b?\n\nYes.", "It is.\n")
    for pieces in cuts(text):
        assert read(pieces, None, reasoning=row, is_thinking=is_thinking) == whole
    for end in range(text.index(marks.end) + len(marks.end)):
        found = read([text[:end]], None, is_cut=True, reasoning=row, is_thinking=is_thinking)
        assert (found.content, marks.end[:3] in found.reasoning) == ("", False)


def test_an_answer_without_thoughts_is_content():
    for text in ("\nYes.", "<b>", "Yes, <think> is a tag."):
        assert read(list(text), None, reasoning="think").content == text


def test_thoughts_come_before_calls_and_granite_s_marks_of_the_answer_are_left_out():
    text = '<think>x <tool_call></think>\n<tool_call>{"name": "now"}</tool_call>'
    found = read(list(text), "hermes", reasoning="think")
    assert (found.reasoning, found.content, len(found.calls)) == ("x <tool_call>", "", 1)
    text = "<think>x</think><response>Yes.</response>"
    assert read(list(text), "granite", reasoning="granite").content == "Yes."


def test_the_channels_of_harmony_are_thoughts_words_and_calls():
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
        '<|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    whole = read([text], HARMONY, reasoning=HARMONY)
    assert (whole.reasoning, whole.content) == ("Hm.", "I will look.")
    assert [(call.name, call.arguments) for call in whole.calls] == [("now", '{"a": 1}')]
    for pieces in cuts(text):
        assert read(pieces, HARMONY, reasoning=HARMONY) == whole
    for end in range(len(text)):
        found = read([text[:end]], HARMONY, is_cut=True, reasoning=HARMONY)
        assert "<|" not in found.content + found.reasoning
    final = "<|channel|>final<|message|>Done < now.<|return|>"
    assert read(list(final), None, reasoning=HARMONY).content == "Done < now."
    assert read(["Plain."], None, reasoning=HARMONY).content == "Plain."
