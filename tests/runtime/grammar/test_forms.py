"""Each form of structured output as a grammar: what it allows, and what it does not."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from pagoda_runtime.grammar.forms import (
    FORMS,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    structural_tag_grammar,
)

TAG = {
    "structures": [
        {"begin": "<f=add>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=say>", "schema": {"type": "string", "maxLength": 3}, "end": ""},
    ],
    "triggers": ["<f="],
}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def allows(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    """Whether an answer may be this text and end there."""
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (json_grammar({"type": "integer", "minimum": 3}), ["3", "40"], ["2", "3.5", '"3"', ""]),
        (json_grammar('{"type": "null"}'), ["null"], ["0", "nul"]),
        (json_grammar(True), ["[1, {}]", "0", '"é"'], ["[1", "a"]),
        (FORMS["json_object"](True), ["{}", '{ "a" : [1]}'], ["[]", "1", "{"]),
        (regex_grammar(r"a/b\n?\d+"), ["a/b1", "a/b\n12"], ["a/b", "xa/b1", "a/b1x"]),
        (regex_grammar("a|bc"), ["a", "bc"], ["ac", "b"]),
        (choice_grammar(['"x"', "a\nb", "é", "a"]), ['"x"', "a\nb", "é", "a"], ["x", "", "b"]),
        (lark_grammar('start: "a" B\nB: /[0-9]{2}/'), ["a12"], ["a1", "12"]),
        (lark_grammar('root ::= "a" num\nnum ::= [0-9] [0-9]?'), ["a1", "a12"], ["a", "a123"]),
        (
            structural_tag_grammar(TAG),
            ["plain", 'x<f=add>12</f> y<f=say>"ab"z', ""],
            ["<f=add>1.5</f>", "<f=other>1</f>", "<f=add>12"],
        ),
    ],
)
def test_a_form_allows_what_it_says_and_nothing_else(tokenizer, grammar, good, bad):
    assert [text for text in good if not allows(tokenizer, grammar, text)] == []
    assert [text for text in bad if allows(tokenizer, grammar, text)] == []


def test_spaces_in_json_are_bounded_unless_asked_otherwise(tokenizer):
    schema = {"type": "array", "items": {"type": "null"}, "maxItems": 1}
    grammar = json_grammar(schema)
    assert allows(tokenizer, grammar, "[\n" + 31 * " " + "null ]")
    assert not allows(tokenizer, grammar, "[" + 33 * " " + "null]")
    compact = json_grammar(schema, has_whitespace=False)
    assert allows(tokenizer, compact, "[null]")
    assert not allows(tokenizer, compact, "[ null]")
    own = json_grammar(schema, whitespace_pattern=" ")
    assert allows(tokenizer, own, "[ null]")
    assert not allows(tokenizer, own, "[\nnull]")
    in_schema = json_grammar({**schema, "x-guidance": {"whitespace_flexible": False}})
    assert allows(tokenizer, in_schema, "[null]")


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        ("json", [], "is not a JSON schema"),
        ("json", "{", "is no JSON"),
        ("json", False, "allows nothing"),
        ("json", {"x-guidance": 3}, "x-guidance"),
        ("json", {"anyOf": [{"minProperties": 2, "additionalProperties": {}}]}, "minProperties 2"),
        ("regex", "", "not empty"),
        ("choice", [], "list of texts"),
        ("choice", ["a", ""], "list of texts"),
        ("choice", ["a"] * 10_001, "at most 10000"),
        ("grammar", "  ", "not empty"),
        ("structural_tag", {"format": {}}, "not supported"),
        ("structural_tag", {**TAG, "triggers": ["<g"]}, "no trigger"),
        ("structural_tag", {**TAG, "structures": [{"begin": "<f="}]}, "no end"),
    ],
)
def test_a_value_that_is_no_such_form_is_refused_with_words(form, value, words):
    with pytest.raises(ValueError, match=words):
        FORMS[form](value)


def test_a_text_is_never_taken_for_grammar(tokenizer):
    text = 'a" | "b\n%import common.INT\n'
    grammar = choice_grammar([text])
    assert allows(tokenizer, grammar, text)
    assert not allows(tokenizer, grammar, "b")
    schema = {"const": '}\nstart: "b"'}
    assert allows(tokenizer, json_grammar(schema), json.dumps(schema["const"]))


def test_keys_that_may_come_twice_do_not_count_as_two(tokenizer):
    several = {"minProperties": 2, "required": ["a"], "additionalProperties": {"type": "null"}}
    grammar = json_grammar({"type": "object", **several})
    assert allows(tokenizer, grammar, '{"a": null, "b": null}')
    assert not allows(tokenizer, grammar, '{"a": null, "a": null}')
    json_grammar({"enum": [{"minProperties": 7}], "properties": {"minProperties": {}}})


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[(name, {}) for name in ("not", "if", "then", "else", "contains", "propertyNames")],
        *[(name, {}) for name in ("dependentSchemas", "dependentRequired", "dependencies")],
        *[(name, False) for name in ("unevaluatedProperties", "unevaluatedItems")],
        ("uniqueItems", True),
        ("minContains", 1),
        ("$dynamicRef", "#a"),
        ("format", "color"),
        ("$ref", "https://example.com/schema"),
        ("pattern", "(?=a)"),
    ],
)
def test_a_keyword_that_cannot_be_served_is_refused_by_name(tokenizer, keyword, value):
    schema = {"type": "object", "properties": {"a": {keyword: value}}}
    error = LLMatcher(tokenizer, json_grammar(schema)).get_error()
    names = {"format": "Unknown format: color", "$ref": "https://example.com/schema"}
    assert names.get(keyword, "look" if keyword == "pattern" else f'"{keyword}"') in error
