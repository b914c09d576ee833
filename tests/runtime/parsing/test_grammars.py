"""Grammars of answers: whatever they let a model write is read as what was asked for."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.parsing.deltas import WholeMessage
from pagoda_runtime.parsing.formats import (
    HARMONY,
    REASONING_FORMATS,
    TOOL_FORMATS,
)
from pagoda_runtime.parsing.grammars import NO_ARGUMENTS, AnswerRules, Tool, write_grammar
from pagoda_runtime.parsing.parser import AnswerParser, Layout

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "unit": {"enum": ["C", "F", 'a"b']},
        "days": {"type": "integer", "minimum": 1, "maximum": 12},
        "hourly": {"type": "boolean"},
        "at": {"$ref": "#/$defs/place"},
        "note": {"type": ["string", "null"], "maxLength": 2},
        "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = (
    Tool("get_weather", SCHEMA),
    Tool("now", NO_ARGUMENTS),
    Tool("say.it-1", {"properties": {"text": {"type": "string", "pattern": "^[a-c]{1,3}$"}}}),
)
SPECIAL = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel|>", "<|message|>", "<|constrain|>")
SPECIAL += ("<|end|>", "<|start|>", "[TOOL_CALLS]", "[ARGS]", "<｜tool▁calls▁begin｜>")
SPECIAL += ("<｜tool▁calls▁end｜>", "<think>", "</think>", "<|tool_call|>", "<tool_call>")


class Model:
    """Writes whatever a grammar allows, at random, with a token for each byte."""

    def __init__(self, folder: Path, special: tuple[str, ...] = ()) -> None:
        write_tiny_tokenizer(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.add_special_tokens(list(special))
        self.guide = LLTokenizer(self.tokenizer.to_str(), eos_token=2)
        self.ids = {text: self.tokenizer.token_to_id(text) for text in special}

    def write(self, rules: AnswerRules, seed: int, most: int = 3000) -> str:
        grammar = write_grammar(rules, self.ids)
        matcher = LLMatcher(self.guide, grammar, log_level=0)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        chance, tokens = random.Random(seed), list[int]()
        while len(tokens) < most and not matcher.is_stopped():
            mask = matcher.compute_bitmask()
            allowed = [
                8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1
            ]
            token = 2 if 2 in allowed and chance.random() < 0.5 else chance.choice(allowed)
            if token == 2:
                break
            tokens.append(token)
            assert matcher.consume_token(token), matcher.get_error()
        assert matcher.is_accepting() or matcher.is_stopped()
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def takes(self, rules: AnswerRules, text: str) -> bool:
        grammar = write_grammar(rules, self.ids)
        matcher = LLMatcher(self.guide, grammar, log_level=0)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("marked"), SPECIAL)


def read(text: str, tools: str | None, **fields: Any) -> WholeMessage:
    schemas = {tool.name: tool.schema for tool in TOOLS}
    parser = AnswerParser(Layout(tools=tools, schemas=schemas, **fields), lambda: "id")
    return WholeMessage.join([*parser.push(text), *parser.finish()])


@pytest.mark.parametrize("row", TOOL_FORMATS)
@pytest.mark.parametrize("kind", ["plain", "marked"])
def test_forced_calls_can_always_be_read_and_fit_their_schemas(row, kind, request):
    model: Model = request.getfixturevalue(kind)
    for seed in range(6):
        text = model.write(
            AnswerRules(tools=row, callable=TOOLS, is_forced=True, max_calls=3), seed
        )
        found = read(text, row)
        assert found.calls, text
        assert found.content == ""
        assert len(found.calls) <= 3
        schemas = {tool.name: tool.schema for tool in TOOLS}
        for call in found.calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])


def test_a_named_tool_is_the_only_one_and_one_call_is_one(plain):
    for row in TOOL_FORMATS:
        rules = AnswerRules(tools=row, callable=TOOLS[1:2], is_forced=True, max_calls=1)
        found = read(plain.write(rules, 1), row)
        assert [(call.name, call.arguments) for call in found.calls] == [("now", "{}")]


@pytest.mark.parametrize("kind", ["plain", "marked"])
@pytest.mark.parametrize("row", ["think", HARMONY, "mistral", "gemma4"])
def test_thoughts_end_by_themselves_or_by_their_budget_and_then_comes_the_answer(
    row, kind, request
):
    model: Model = request.getfixturevalue(kind)
    marks = REASONING_FORMATS[row]
    head = "<|channel|>final<|message|>" if row == HARMONY else ""
    rules = AnswerRules(reasoning=row, is_thinking=True, thinking_tokens=40, answer='start: "yes"')
    assert model.takes(rules, f"Hm.{marks.end}{head}yes")
    assert model.takes(rules, f"{marks.end}{head}yes")
    assert model.takes(rules, f"{40 * '-'}{marks.end}\n\n{head}yes")
    assert not model.takes(rules, f"{41 * '-'}{marks.end}{head}yes")
    assert not model.takes(rules, f"Hm.{marks.end}{head}no")
    free = AnswerRules(reasoning=row, may_think=True, answer='start: "yes"')
    assert model.takes(free, f"{head}yes")
    assert model.takes(free, f"{marks.begin}{'Hm. ' * 9}{marks.end}\n{head}yes")
    assert not model.takes(free, f"{marks.begin}Hm.")


@pytest.mark.parametrize("kind", ["plain", "marked"])
def test_a_budget_leaves_the_answer_free(kind, request):
    model: Model = request.getfixturevalue(kind)
    rules = AnswerRules(reasoning="think", is_thinking=True, thinking_tokens=20)
    assert model.takes(rules, 'Hm.</think>Any <tool_call>{"x"}</tool_call> text.')
    assert not model.takes(rules, "-" * 30)


@pytest.mark.parametrize("row", TOOL_FORMATS)
@pytest.mark.parametrize("kind", ["plain", "marked"])
def test_strict_tools_are_called_as_their_schemas_say_or_not_at_all(row, kind, request):
    model: Model = request.getfixturevalue(kind)
    rules = AnswerRules(tools=row, callable=(Tool("now", NO_ARGUMENTS, True), *TOOLS[:1]))
    head = "<|channel|>final<|message|>" if row == HARMONY else ""
    assert model.takes(rules, f"{head}Just words.\n")
    forced = AnswerRules(tools=row, callable=TOOLS[:1], is_forced=True, max_calls=2)
    calls = model.write(forced, 3)
    assert model.takes(rules, calls)
    lead = "" if TOOL_FORMATS[row].bare or head else "Let me see. "
    assert model.takes(rules, lead + calls)
    assert not model.takes(rules, lead + calls.replace("get_weather", "get_nothing"))


def test_a_structured_answer_or_calls_may_come(plain):
    rules = AnswerRules(tools="hermes", callable=TOOLS[1:2], answer='start: "yes"')
    assert plain.takes(rules, "yes")
    assert plain.takes(rules, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not plain.takes(rules, "no")


@pytest.mark.parametrize("row", TOOL_FORMATS)
@pytest.mark.parametrize(
    "part",
    [
        {"enum": 5},
        {"type": "string", "pattern": 3},
        {"type": "string", "pattern": "a/b(["},
        {"type": "string", "minLength": "x"},
        {"type": ["nothing"]},
        {"type": "object", "properties": {"x": 1}, "required": 3},
        {"$ref": "#/properties/a"},
        {"$ref": "#/$defs/missing"},
        True,
        {"anyOf": {}},
    ],
)
def test_a_schema_that_is_none_is_told_of_and_nothing_worse(row, part):
    tool = Tool("f", {"type": "object", "properties": {"a": part}, "required": ["a"]}, True)
    rules = AnswerRules(tools=row, callable=(tool,), is_forced=True)
    # Of what it does not look at, llguidance tells.
    with suppress(ValueError):
        assert write_grammar(rules, {}).startswith("start: ")


def test_slashes_of_a_pattern_are_those_of_the_text(plain):
    parameters = {
        "properties": {"a": {"type": "string", "pattern": r"^x/y\\/z\\\\$"}},
        "required": ["a"],
    }
    rules = AnswerRules(tools="glm45", callable=(Tool("f", parameters),), is_forced=True)
    text = plain.write(rules, 0)
    assert r"<arg_value>x/y\/z\\</arg_value>" in text


@pytest.mark.parametrize("row", ["glm45", "qwen3_coder", "gemma4"])
@pytest.mark.parametrize("part", [{"format": "date"}, {"pattern": "^a", "maxLength": 3}])
def test_what_a_string_without_quotes_cannot_be_held_to_is_refused_where_it_is_strict(row, part):
    schema = {"properties": {"a": {"type": "string", **part}}}
    for is_strict in (False, True):
        rules = AnswerRules(tools=row, callable=(Tool("f", schema, is_strict),), is_forced=True)
        with pytest.raises(ValueError, match="a strict one, f") if is_strict else nullcontext():
            write_grammar(rules, {})
