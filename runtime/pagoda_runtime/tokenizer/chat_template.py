"""Chat templates: Jinja in a sandbox, with the names that templates on the hub rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagoda_runtime.errors import RequestError

Message = Mapping[str, Any]
# Words that no template contains, to see what it makes of content.
_PROBES = ("pagodaprobea", "pagodaprobeb")
_PROBE_PRINTED = re.compile(rf"""text['"]: ?['"]({"|".join(_PROBES)})""")
# Messages around the one that is probed: some templates refuse a conversation without a user.
_USER = {"role": "user", "content": "x"}


class ChatTemplate:
    """A template that is compiled, and what it makes of the two forms of content.

    Content is a string or a list of parts. Templates that loop over parts lose the words of a
    string, others print a list as Python writes it; so each message is given in the form that the
    template writes, its own if it writes both.

    Raises: jinja2.TemplateSyntaxError.
    """

    def __init__(self, source: str) -> None:
        self._template = _compile(source)
        self._writes: dict[tuple[str, int], bool] = {}

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises: RequestError: the template refuses the messages; its own words are in the message.
        """
        try:
            fitted = [self._fit(message, variables) for message in messages]
            return self._render(fitted, variables)
        # A template is a program: it can fail in any way, and never by the server's fault.
        except Exception as error:
            raise RequestError(
                f"The chat template refuses these messages: {str(error) or type(error).__name__}",
                param="messages",
            ) from error

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        # Templates tell "no tools" from tools by `is none`, which an undefined name is not.
        return self._template.render(
            {"tools": None, "documents": None} | dict(variables), messages=messages
        )

    def _fit(self, message: Message, variables: Mapping[str, Any]) -> Message:
        """The message with its content in a form that the template writes."""
        content = message.get("content")
        if isinstance(content, str):
            forms: list[Any] = [content, _to_parts(content)]
        elif isinstance(content, list) and content and all(map(_is_text, content)):
            text = "".join(part["text"] for part in content)
            forms = [content, text, _to_parts(text)]
        else:
            return dict(message)
        role = str(message.get("role"))
        fitting = (form for form in forms if self._writes_form(role, form, variables))
        return {**message, "content": next(fitting, content)}

    def _writes_form(self, role: str, form: Any, variables: Mapping[str, Any]) -> bool:
        """Whether content of this form comes out as words, by trying it once for each role."""
        num_parts = 0 if isinstance(form, str) else min(len(form), len(_PROBES))
        key = (role, num_parts)
        if key not in self._writes:
            self._writes[key] = self._probe(role, num_parts, variables)
        return self._writes[key]

    def _probe(self, role: str, num_parts: int, variables: Mapping[str, Any]) -> bool:
        words = _PROBES[: num_parts or 1]
        content = [part for word in words for part in _to_parts(word)] if num_parts else words[0]
        around = {"system": ([], [_USER]), "assistant": ([_USER], [])}
        before, after = around.get(role, ([], []))
        probed = {"role": role if role in around else "user", "content": content}
        try:
            text = self._render([*before, probed, *after], variables)
        except Exception:
            return False
        return all(word in text for word in words) and not _PROBE_PRINTED.search(text)


def _to_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    """Raises: jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 (templates pass it by this name)
    return datetime.now().strftime(format)
