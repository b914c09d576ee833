"""Answers in the format of each row, as a model writes them, and readers of them, for tests."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from pagoda_runtime.parsing.deltas import Delta, WholeMessage
from pagoda_runtime.parsing.formats import HARMONY, TOOL_FORMATS
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


def make_parser(row: str | None, **fields: Any) -> AnswerParser:
    numbers = itertools.count()
    layout = Layout(tools=row, schemas=SCHEMAS, **fields)
    return AnswerParser(layout, lambda: f"id{next(numbers)}")


def read(
    pieces: Sequence[str], row: str | None, *, is_cut: bool = False, **fields: Any
) -> WholeMessage:
    """A whole answer that comes in these pieces."""
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
