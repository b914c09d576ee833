"""Grammars of answers, in llguidance's form of Lark: what a row of `formats` writes, no more.

So that a call that is forced can always be read, and its arguments are as the tool's schema says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pagoda_runtime.grammar.lark import ANY_TEXT, SOME_TEXT, Lark, Schema, quoted
from pagoda_runtime.parsing.calls import GLM_TAGS, QWEN_TAGS, Tags, properties_of
from pagoda_runtime.parsing.formats import (
    HARMONY,
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
)
from pagoda_runtime.parsing.literals import resolve, types_of

MAX_FORCED_CALLS = 16
# Of a schema whose values have a grammar of ours.
MAX_DEPTH = 5
HARMONY_FINAL = "<|channel|>final<|message|>"
NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(NamedTuple):
    """A tool of a request."""

    name: str
    schema: Schema
    """Of its arguments."""
    is_strict: bool = False


def write_calls(
    lark: Lark, row: ToolFormat, tools: Sequence[Tool], max_calls: int, behind: str = ""
) -> str:
    """An expression for one call or more of these tools.

    Args:
        behind: what was read of the first one already.
    """
    written = row.written
    first = [_write_call(lark, row, tool, written.begin, behind) for tool in tools]
    later = [_write_call(lark, row, tool, "", "") for tool in tools]
    calls = f"({' | '.join(first)})"
    if max_calls > 1 and not written.is_single:
        separator = lark.literal(written.separator) if written.separator else ""
        calls += f" ({separator} ({' | '.join(later)})){{0,{max_calls - 1}}}"
    return f"{calls} {lark.literal(written.end)}" if written.end else calls


def _write_call(lark: Lark, row: ToolFormat, tool: Tool, begin: str, behind: str) -> str:
    written = row.written
    head = (begin + written.call.replace("{name}", tool.name)).removeprefix(behind)
    parts = [lark.literal(head), _write_arguments(lark, row, tool)]
    if written.call_end:
        parts.append(lark.literal(written.call_end))
    return lark.rule(" ".join(filter(None, parts)))


def _write_arguments(lark: Lark, row: ToolFormat, tool: Tool) -> str:
    schema, is_strict = tool.schema, tool.is_strict
    match row.written.arguments:
        case "json":
            return lark.json({"type": "object", **schema}, is_strict=is_strict)
        case "qwen":
            return _write_tagged(lark, tool, QWEN_TAGS)
        case "glm":
            return _write_tagged(lark, tool, GLM_TAGS)
        case "python":
            return _write_list(
                lark,
                {f"{k}=": _python_value(lark, tool, s) for k, s in properties_of(schema).items()},
                {f"{k}=" for k in _required(schema)},
            )
        case "gemma":
            return _gemma_object(lark, tool, schema, row.marks[0])


def _nested(tool: Tool, schema: Any) -> Schema:
    """A part of the tool's schema as one of its own, with what its references mean."""
    shared = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
    return {**shared, **schema} if isinstance(schema, Mapping) else shared


def _json_value(lark: Lark, tool: Tool, schema: Any) -> str:
    return lark.json(_nested(tool, schema), is_strict=tool.is_strict)


def _write_tagged(lark: Lark, tool: Tool, tags: Tags) -> str:
    required, parts = _required(tool.schema), []
    between = "" if tags.value.isspace() else "\n"
    for key, schema in properties_of(tool.schema).items():
        head = lark.literal(f"{tags.key}{key}{tags.key_end}{between}{tags.value}")
        end = tags.value_ends[0]
        if "string" in types_of(schema):
            value = _text_value(lark, tool, schema, end)
        else:
            value = f"{_json_value(lark, tool, schema)} {lark.literal(end)}"
        part = lark.rule(f"{head} {value} {quoted(chr(10))}")
        parts.append(part if key in required else f"{part}?")
    return " ".join(parts)


def _required(schema: Schema) -> set[str]:
    names = schema.get("required", [])
    if not isinstance(names, list):
        raise ValueError("have a schema whose required is no list")
    return set(map(str, names))


def _text_value(lark: Lark, tool: Tool, schema: Schema, end: str) -> str:
    """A string without quotes, and what ends it."""
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if not isinstance(values, list):
        raise ValueError("have a schema whose enum is no list")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if texts:
        return f"({' | '.join(lark.literal(text + end) for text in texts)})"
    has_length = not schema.keys().isdisjoint(("minLength", "maxLength"))
    if tool.is_strict and ("format" in schema or ("pattern" in schema and has_length)):
        raise ValueError(
            f"have a strict one, {tool.name}, with a string of a format, or of a pattern and a "
            "length, which the model's form of calls cannot be held to"
        )
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    pattern = ANY_TEXT if (least, most) == (0, "") else f"/(?s:.{{{least},{most}}})/"
    if isinstance(schema.get("pattern"), str):
        pattern = _search(schema["pattern"])
    return lark.text_until(end, pattern)


def _search(pattern: str) -> str:
    """A schema's pattern, which may match anywhere, as one of the whole text."""
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") else "(?s:.*)"
    body = pattern.removeprefix("^").removesuffix("$")
    body = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", body)
    return f"/{begin}(?:{body}){end}/"


def _python_value(lark: Lark, tool: Tool, schema: Any) -> str:
    """As JSON, which Python's strings, numbers and lists may be; but True, False and None."""
    words = {"boolean": '"True" | "False"', "null": '"None"'}
    types = types_of(schema)
    if types and types <= words.keys() and "enum" not in schema and "const" not in schema:
        return lark.rule(" | ".join(words[name] for name in sorted(types)))
    return _json_value(lark, tool, schema)


def _write_list(lark: Lark, values: Mapping[str, str], required: set[str]) -> str:
    """Values behind their keys, with commas: those that are required, then any of the others."""
    items = {k: lark.rule(f"{lark.literal(k)} {v}") for k, v in values.items()}
    needed = [item for key, item in items.items() if key in required]
    others = [item for key, item in items.items() if key not in required]
    if needed:
        tail = [f'("," {item})?' for item in others]
        return " ".join([' "," '.join(needed), *tail])
    starts = [
        " ".join([item, *(f'("," {later})?' for later in others[number + 1 :])])
        for number, item in enumerate(others)
    ]
    return f"({' | '.join(starts)})?" if starts else ""


def _gemma_object(lark: Lark, tool: Tool, schema: Schema, quote: str, depth: int = 0) -> str:
    parts = properties_of(schema) if depth < MAX_DEPTH else {}
    values = {f"{k}:": _gemma_value(lark, tool, part, quote, depth) for k, part in parts.items()}
    required = {f"{key}:" for key in _required(schema)}
    return f'"{{" {_write_list(lark, values, required)} "}}"'


def _gemma_value(lark: Lark, tool: Tool, schema: Any, quote: str, depth: int) -> str:
    found = resolve(tool.schema, schema)
    part = found if isinstance(found, Mapping) else {}
    types = types_of(part) or {"string"}
    forms = []
    if "string" in types:
        forms.append(f"{lark.literal(quote)} {_text_value(lark, tool, part, quote)}")
    if "object" in types:
        forms.append(_gemma_object(lark, tool, part, quote, depth + 1))
    if "array" in types:
        # What goes on within itself ends somewhere.
        item = part.get("items", {}) if depth < MAX_DEPTH else {}
        written = _gemma_value(lark, tool, item, quote, depth + 1)
        forms.append(f'"[" ({written} ("," {written})*)? "]"')
    if plain := sorted(types - {"string", "object", "array"}):
        forms.append(_json_value(lark, tool, {**part, "type": plain}))
    return lark.rule(" | ".join(forms))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRules:
    """What an answer has to be.

    Args:
        tools: the row of TOOL_FORMATS, where calls are forced or bound to their schemas.
        is_forced: whether there must be a call.
        reasoning: the row of REASONING_FORMATS.
        callable: the tools; max_calls: of the answer.
        is_thinking: whether the prompt leaves the answer within its thoughts; may_think: whether it
            may begin with them.
        thinking_tokens: at most so many tokens of thoughts.
        answer: the grammar of an answer in words, None where it is free.
    """

    tools: str | None = None
    callable: tuple[Tool, ...] = ()
    is_forced: bool = False
    max_calls: int = MAX_FORCED_CALLS
    reasoning: str | None = None
    is_thinking: bool = False
    may_think: bool = False
    thinking_tokens: int | None = None
    answer: str | None = None


def write_grammar(rules: AnswerRules, special: Mapping[str, int]) -> str:
    """The grammar of an answer: thoughts, if there are any, and then calls or words.

    Args:
        special: the special tokens among the marks of the rows, by their text.
    """
    lark = Lark(special)
    body = f"({_write_body(lark, rules)})"
    if rules.reasoning is not None and (rules.is_thinking or rules.may_think):
        body = f"{_write_thoughts(lark, REASONING_FORMATS[rules.reasoning], rules)} {body}"
    text = lark.render(body)
    if rules.answer is None:
        return text
    grammars = [{"lark_grammar": text}, {"name": "answer", "lark_grammar": rules.answer}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _write_thoughts(lark: Lark, row: ReasoningFormat, rules: AnswerRules) -> str:
    text = lark.text_until(row.end, max_tokens=rules.thinking_tokens)
    space = r"/\n{0,2}/"
    return (
        f"{text} {space}" if rules.is_thinking else f"({lark.literal(row.begin)} {text} {space})?"
    )


def _write_body(lark: Lark, rules: AnswerRules) -> str:
    """Calls or words, whatever of them may be."""
    row = None if rules.tools is None else TOOL_FORMATS[rules.tools]
    head = lark.literal(HARMONY_FINAL) if HARMONY in (rules.tools, rules.reasoning) else ""
    # One that begins by letters of its own is looked for among other words.
    is_sought = (
        row is not None
        and not (rules.is_forced or rules.answer is not None or head or row.bare)
        and not any(token in row.openers[0] for token in lark.special)
    )
    if row is not None and is_sought:
        opener = row.openers[0]
        lead = lark.rule(f"/(?s:.*){_escaped(opener)}/", "[lazy]")
        behind = write_calls(lark, row, rules.callable, rules.max_calls, behind=opener)
        return f"({lead} {behind})? {ANY_TEXT}"
    calls = "" if row is None else write_calls(lark, row, rules.callable, rules.max_calls)
    if rules.is_forced:
        return calls
    if rules.answer is not None:
        words = f"{head} @answer"
        return f"{calls} | {words}" if calls else words
    if row is None:
        ids = ",".join(map(str, lark.special.values()))
        return f"({SOME_TEXT} | <[{ids}]>)*" if ids else ANY_TEXT
    if head:
        return f"{calls} | {head} {ANY_TEXT}"
    if row.bare:
        return f"{calls} | /(?s:[^\\s\\{row.bare}].*)?/"
    return f"{ANY_TEXT} ({calls} {ANY_TEXT})?"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
