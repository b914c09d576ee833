"""Chat templates: Jinja in a sandbox, with the names that templates on the hub rely on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

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
_PRINTED_OBJECT = f"{{'{_PROBES[0]}"
# Of computing, whatever else the machine does; a conversation that fills a context takes a tenth.
MAX_SECONDS = 2.0
# Of a repeated text or list.
MAX_REPEATED = 1_000_000
MAX_EXPONENT = 1024
# By this name templates find what watches their time.
_WATCH = "_pagoda_watch"
# Messages around the one that is probed: some templates refuse a conversation without a user.
_USER = {"role": "user", "content": "x"}


class ChatTemplate:
    """A template that is compiled, and what it makes of the two forms of content.

    Content is a string or a list of parts. Templates that loop over parts lose the words of a
    string, others print a list as Python writes it; so each message is given in the form that the
    template writes, its own if it writes both. The arguments of calls likewise: most templates
    take an object, some a text; and some see calls only where there is no content.

    Args:
        clock: seconds of computing of the thread that renders.
    Raises: jinja2.TemplateSyntaxError.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.thread_time) -> None:
        self._template = _compile(source)
        self._clock = clock
        self._writes: dict[tuple[str, int], bool] = {}
        self._calls_form: Callable[[Message], Message] | None = None
        """Of a message with calls; None: nobody asked yet."""

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises: RequestError: the template refuses the messages, its own words are in the message;
            or it takes more than MAX_SECONDS.
        """
        deadline = self._clock() + MAX_SECONDS

        def watch() -> None:
            if self._clock() > deadline:
                raise _TooSlow(f"it is not done after {MAX_SECONDS:g} seconds of computing")

        # Templates tell "no tools" from tools by `is none`, which an undefined name is not.
        variables = {"tools": None, "documents": None, **variables, _WATCH: watch}
        try:
            fitted = [self._fit(message, variables) for message in messages]
            return self._template.render(variables, messages=fitted)
        # A template is a program: it can fail in any way, and never by the server's fault.
        except Exception as error:
            raise RequestError(
                f"The chat template refuses these messages: {str(error) or type(error).__name__}",
                param="messages",
            ) from error

    def _fit(self, message: Message, variables: Mapping[str, Any]) -> Message:
        """The message in a form that the template writes."""
        if message.get("tool_calls"):
            if self._calls_form is None:
                self._calls_form = self._probe_calls(variables)
            message = self._calls_form(message)
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
        text = self._try([*before, probed, *after], variables)
        return all(word in text for word in words) and not _PROBE_PRINTED.search(text)

    def _probe_calls(self, variables: Mapping[str, Any]) -> Callable[[Message], Message]:
        """The first form in which name and arguments come out, and these as JSON."""
        function = {"name": "f", "arguments": dict([_PROBES])}
        call = {"id": "pagoda000", "type": "function", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        for form in _CALLS_FORMS:
            text = self._try([_USER, form(message)], variables)
            if all(word in text for word in _PROBES) and _PRINTED_OBJECT not in text:
                return form
        return _CALLS_FORMS[0]

    def _try(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text, empty if the template refuses the messages."""
        try:
            return self._template.render(variables, messages=messages)
        except _TooSlow:
            raise
        except Exception:
            return ""


class _TooSlow(Exception):
    """A template computes for too long."""


def _with_text_arguments(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


def _without_content(message: Message) -> Message:
    return {**message, "content": message["content"] or None}


_CALLS_FORMS: tuple[Callable[[Message], Message], ...] = (
    dict,
    _without_content,
    _with_text_arguments,
    lambda message: _without_content(_with_text_arguments(message)),
)


def _to_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def cut_behind(text: str, message: Mapping[str, Any]) -> str:
    """The prompt up to the end of a message's words. Raises RequestError if it has none of them."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    words = "".join(parts).strip()
    at = text.rfind(words)
    if at < 0:
        raise RequestError(
            "The chat template changes the words of the last message, so that they cannot be "
            "continued.",
            param="continue_final_message",
        )
    return text[: at + len(words)]


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on what a template computes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            is_repeated = isinstance(value, (str, list, tuple)) and isinstance(times, int)
            if operator == "*" and is_repeated and len(value) * times > MAX_REPEATED:
                raise jinja2.TemplateError(f"it repeats a value to more than {MAX_REPEATED} parts")
        if operator == "**" and abs(right) > MAX_EXPONENT:
            raise jinja2.TemplateError(f"an exponent is larger than {MAX_EXPONENT}")
        return super().call_binop(context, operator, left, right)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        # Jinja compiles a line for each frame of a traceback that nobody sees.
        if source is not None:
            super().handle_exception(source)
        raise

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        # Whatever goes on for long does so in loops and macros.
        blocks: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For)]
        for block in [*blocks, *tree.find_all(nodes.Macro)]:
            watch = nodes.Call(nodes.Name(_WATCH, "load"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(watch))
        return tree


def _compile(source: str) -> jinja2.Template:
    """Raises: jinja2.TemplateSyntaxError."""
    environment = _Environment(
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
