"""A chat before its answer: what in it cannot be, what the template is told, what may come."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pagoda_runtime.config import ServerConfig
from pagoda_runtime.errors import RequestError, shown
from pagoda_runtime.parsing.formats import (
    REASONING_ALIASES,
    REASONING_FORMATS,
    TOOL_ALIASES,
    TOOL_FORMATS,
    guess_format,
    marks_of,
)
from pagoda_runtime.parsing.grammars import MAX_FORCED_CALLS, NO_ARGUMENTS, AnswerRules, Tool
from pagoda_runtime.parsing.parser import Layout
from pagoda_runtime.server.chat_protocol import (
    ChatCompletionRequest,
    ChatMessage,
    Function,
    to_call,
)
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

# Variables of templates that are fields of their own.
_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "chat_template")


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """How a model calls tools and thinks: rows of `parsing.formats`, None where it does not."""

    tools: str | None
    reasoning: str | None

    def make_call_id(self) -> str:
        if self.tools is not None and TOOL_FORMATS[self.tools].has_short_ids:
            return uuid.uuid4().hex[:9]
        return f"call_{uuid.uuid4().hex[:24]}"


@lru_cache(64)
def special_marks(formats: ChatFormats, tokenizer: Tokenizer) -> Mapping[str, int]:
    """The special tokens among the formats' marks: they are text to whoever reads an answer."""
    tools = None if formats.tools is None else TOOL_FORMATS[formats.tools]
    reasoning = None if formats.reasoning is None else REASONING_FORMATS[formats.reasoning]
    marks = marks_of(tools, reasoning)
    return {text: i for text, i in tokenizer.special_token_ids.items() if text in marks}


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a prompt leaves the thoughts of the answer."""

    is_open: bool = False
    """Whether the answer begins within them."""
    may_begin: bool = False


@lru_cache(64)
def find_formats(template: str | None, tool_parser: str, reasoning_parser: str) -> ChatFormats:
    """The formats that flags name, or that a template has.

    Args:
        tool_parser, reasoning_parser: a row or an alias of it, auto or none.
    """
    return ChatFormats(
        _find_format(template, tool_parser, TOOL_FORMATS, TOOL_ALIASES),
        _find_format(template, reasoning_parser, REASONING_FORMATS, REASONING_ALIASES),
    )


def _find_format(
    template: str | None, parser: str, formats: Mapping[str, Any], aliases: Mapping[str, str]
) -> str | None:
    name = guess_format(template, formats) if parser == "auto" else parser
    return None if name in (None, "none") else aliases.get(name, name)


def choose_template(
    request: ChatCompletionRequest, tokenizer: Tokenizer, config: ServerConfig, own: str | None
) -> str | None:
    """The template of a chat: the request's, the server's own, or one of the model's.

    Raises: RequestError: the request's is none that it may use.
    """
    named = tokenizer.named_templates
    if request.chat_template:
        if config.trust_request_chat_template or request.chat_template in named:
            return named.get(request.chat_template, request.chat_template)
        names = ", ".join(sorted(named)) or "none"
        raise RequestError(
            f"chat_template is {shown(request.chat_template)}; it must be the name of one of the "
            f"model's templates ({names}). Templates of requests are taken only by a server with "
            "--trust-request-chat-template.",
            param="chat_template",
        )
    if own is not None:
        return own
    if request.callable_tools and "tool_use" in named:
        return named["tool_use"]
    return tokenizer.chat_template


def template_variables(request: ChatCompletionRequest) -> dict[str, Any]:
    """What the template is told beside the messages. Raises RequestError."""
    given = request.chat_template_kwargs or {}
    if taken := [name for name in _FIELDS if name in given]:
        param = f"chat_template_kwargs.{taken[0]}"
        raise RequestError(f"{param} is a field of its own; send it as {taken[0]}.", param=param)
    variables: dict[str, Any] = {}
    if request.callable_tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if request.documents:
        variables["documents"] = request.documents
    if request.reasoning_effort == "none":
        variables["enable_thinking"] = False
    elif request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return variables | given


def template_messages(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The messages as chat templates know them: a developer is a system, and the answers of tools
    have their names. The arguments of calls are objects."""
    names = {call.id: call.function.name for _, call in request.calls()}
    return [_template_message(message, names) for message in request.messages]


def _template_message(message: ChatMessage, names: Mapping[str, str]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content or ""
    if not isinstance(content, str):
        content = [{"type": part.type, "text": part.text} for part in content]
    if role == "tool":
        tool_call_id = message.tool_call_id or ""
        name = message.name or names.get(tool_call_id, "")
        return {"role": role, "tool_call_id": tool_call_id, "name": name, "content": message.text}
    made: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        made["name"] = message.name
    if message.thoughts:
        # The names that templates know; gpt-oss's knows one of them, and not beside content.
        made |= dict.fromkeys(("reasoning_content", "reasoning"), message.thoughts)
        made |= {} if content else {"thinking": message.thoughts}
    if message.tool_calls:
        made["tool_calls"] = [
            to_call(call.id, call.function.name, json.loads(call.function.arguments or "{}"))
            for call in message.tool_calls
        ]
    return made


def find_thinking(
    request: ChatCompletionRequest, formats: ChatFormats, prompt_end: str
) -> Thinking:
    """Whether the answer begins within thoughts, as the prompt's end has it."""
    if formats.reasoning is None:
        return Thinking()
    row = REASONING_FORMATS[formats.reasoning]
    begin, end = row.begin.strip(), row.end.strip()
    if request.continue_final_message:
        text = request.messages[-1].text
        return Thinking(is_open=text.rfind(begin) > text.rfind(end))
    words = prompt_end.rstrip()
    is_open = words.endswith(begin)
    return Thinking(is_open, may_begin=not is_open and not words.endswith(end))


def make_layout(
    request: ChatCompletionRequest, formats: ChatFormats, thinking: Thinking
) -> Layout | None:
    """What is looked for in the answer; None: all of it is content.

    Raises: RequestError: tools or a budget for a model that has no format for them.
    """
    tools = request.callable_tools
    if tools and formats.tools is None:
        raise RequestError(
            "tools are not supported by this model: its chat template has no format of calls that "
            "is known here. Name one with --tool-call-parser, or leave tools out.",
            param="tools",
        )
    if request.thinking_token_budget is not None and formats.reasoning is None:
        raise RequestError(
            "thinking_token_budget is not supported by this model: its chat template has no "
            "thoughts in a format that is known here. Name one with --reasoning-parser, or leave "
            "it out.",
            param="thinking_token_budget",
        )
    if not tools and formats.reasoning is None:
        return None
    return Layout(
        tools=formats.tools if tools else None,
        reasoning=formats.reasoning,
        is_thinking=thinking.is_open,
        schemas={tool.name: tool.parameters or {} for tool in tools},
        max_calls=1 if request.parallel_tool_calls is False else None,
    )


def make_rules(
    request: ChatCompletionRequest, formats: ChatFormats, thinking: Thinking, answer: str | None
) -> AnswerRules | None:
    """What the answer has to be; None where it is free, or `answer` says all of it.

    Args:
        answer: the grammar of the answer in words.
    """
    tools = request.callable_tools
    is_bound = request.must_call or any(tool.strict for tool in tools)
    has_thoughts = formats.reasoning is not None and (thinking.is_open or thinking.may_begin)
    has_budget = has_thoughts and request.thinking_token_budget is not None
    if not is_bound and not has_budget and (answer is None or not (has_thoughts or tools)):
        return None
    callable_tools = request.forced_tools if request.must_call else tools
    return AnswerRules(
        tools=formats.tools if callable_tools and (is_bound or answer is not None) else None,
        callable=tuple(map(_to_tool, callable_tools)),
        is_forced=request.must_call,
        max_calls=1 if request.parallel_tool_calls is False else MAX_FORCED_CALLS,
        reasoning=formats.reasoning,
        is_thinking=thinking.is_open,
        may_think=thinking.may_begin,
        thinking_tokens=request.thinking_token_budget,
        answer=answer,
    )


def _to_tool(function: Function) -> Tool:
    # As OpenAI's API has it: without parameters a function takes none.
    schema = NO_ARGUMENTS if function.parameters is None else function.parameters
    return Tool(function.name, schema, bool(function.strict))
