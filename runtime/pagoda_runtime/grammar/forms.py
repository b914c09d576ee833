"""Grammars from what users ask for: each form of structured output as a text in llguidance's Lark.

Raises ValueError that says of the value what is wrong with it, to be put behind its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import msgspec
from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from pagoda_runtime.grammar.lark import ANY_TEXT, quoted

# Any JSON value; spaces between its parts are bounded, or a weak model writes nothing else.
_WHITESPACE = r"[ \t\n\r]{1,32}"
MAX_CHOICES = 10_000


def json_grammar(
    schema: Any, *, whitespace_pattern: str | None = None, has_whitespace: bool = True
) -> str:
    """JSON that a schema describes.

    Args:
        schema: an object, a boolean, or a text of one.
        whitespace_pattern: a regular expression of what may stand between the parts.
        has_whitespace: whether anything may.
    """
    return f"start: {_json_rule(schema, whitespace_pattern, has_whitespace)}\n"


def regex_grammar(regex: str) -> str:
    """A text that a regular expression matches from its beginning to its end."""
    if not isinstance(regex, str) or not regex:
        raise ValueError("must be a regular expression that is not empty")
    # Digits and letters of words are those of ASCII, as in JSON schemas.
    return f"start: /{regex_to_lark(regex, 'dw')}/\n"


def choice_grammar(choices: Any) -> str:
    """One of some texts."""
    if not isinstance(choices, (list, tuple)) or not choices or not all(choices):
        raise ValueError("must be a list of texts, and neither it nor one of them empty")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"has {len(choices)} texts; at most {MAX_CHOICES} fit")
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError("must be a list of texts alone")
    # As one terminal, whatever their number.
    return f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}\n"


def lark_grammar(grammar: str) -> str:
    """Lark as it is; EBNF as GBNF has it (`root ::= …`) translated."""
    if not isinstance(grammar, str) or not grammar.strip():
        raise ValueError("must be a grammar that is not empty")
    return gbnf_to_lark(grammar) if "::=" in grammar else grammar


def structural_tag_grammar(tag: Any) -> str:
    """Any text, in which a trigger must begin one of the structures.

    Args:
        tag: {"structures": [{"begin", "schema", "end"}, …], "triggers": [text, …]}, or its text.
    """
    tag = _parse(tag)
    structures = tag.get("structures") if isinstance(tag, Mapping) else None
    triggers = tag.get("triggers") if isinstance(tag, Mapping) else None
    if not _is_list_of(structures, Mapping) or not _is_list_of(triggers, str):
        raise ValueError(
            "must have `structures`, a list of objects with begin, schema and end, and `triggers`, "
            "a list of texts; other forms of structural tags are not supported"
        )
    names, rules = [], []
    for number, structure in enumerate(structures):
        begin, end = structure.get("begin"), structure.get("end")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise ValueError(f"has no begin or no end in structures[{number}]")
        trigger = next((t for t in triggers if t and begin.startswith(t)), None)
        if trigger is None:
            raise ValueError(f"has no trigger for the begin of structures[{number}]")
        parts = begin[len(trigger) :], end
        rest, last = (f" {quoted(part)}" if part else "" for part in parts)
        names.append(f"tag_{number}")
        rules += [
            f"head_{number}[lazy]: TEXT {quoted(trigger)}",
            f"tag_{number}: head_{number}{rest} body_{number}{last}",
            f"body_{number}: {_json_rule(structure.get('schema', {}))}",
        ]
    lines = [f"start: ({' | '.join(names)})* TEXT", f"TEXT: {ANY_TEXT}", *rules]
    return "\n".join(lines) + "\n"


FORMS: dict[str, Callable[[Any], str]] = {
    "json": json_grammar,
    "json_object": lambda _: json_grammar({"type": "object"}),
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
    "structural_tag": structural_tag_grammar,
}
"""By vLLM's names."""


def _json_rule(
    schema: Any, whitespace_pattern: str | None = None, has_whitespace: bool = True
) -> str:
    schema = _parse(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        what = "allows nothing" if schema is False else "is not a JSON schema: it must be an object"
        raise ValueError(what)
    _verify_keys_differ(schema)
    options: dict[str, Any] = {"whitespace_pattern": whitespace_pattern or _WHITESPACE}
    if not has_whitespace:
        options = {"whitespace_flexible": False}
    given = schema.get("x-guidance", {})
    if not isinstance(given, Mapping):
        raise ValueError("has an x-guidance that is no object")
    return f"%json {json.dumps({**schema, 'x-guidance': {**options, **given}})}"


def _verify_keys_differ(schema: Any) -> None:
    """llguidance lets a free key come twice, which JSON counts as one."""
    if isinstance(schema, Mapping):
        least, required = schema.get("minProperties"), schema.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least - num_required > 1:
            raise ValueError(
                f"has minProperties {least} and {num_required} required keys; at most one key must "
                "come beside the required ones"
            )
    parts = schema.items() if isinstance(schema, Mapping) else enumerate(schema)
    for name, part in parts:
        if isinstance(part, (Mapping, list)) and name not in (
            "const",
            "enum",
            "default",
            "examples",
        ):
            _verify_keys_differ(part)


def _parse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise ValueError(f"is no JSON: {error}") from None


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and value != [] and all(isinstance(item, kind) for item in value)
