"""The formats in which models call tools and think, a row each, and which one a template has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from pagoda_runtime.parsing.calls import (
    DEEPSEEK_ALL,
    DEEPSEEK_ALL_END,
    DEEPSEEK_CALL,
    DEEPSEEK_END,
    DEEPSEEK_SEPARATOR,
    GLM_TAGS,
    QWEN_TAGS,
    Source,
    read_deepseek,
    read_gemma,
    read_json,
    read_mistral,
    read_python,
    read_tagged,
)
from pagoda_runtime.parsing.scanner import Reading

HARMONY = "openai"
"""vLLM's name of gpt-oss's format: every message has a channel. `harmony` reads it."""


class Written(NamedTuple):
    """How calls are written, to force them: begin, call [separator call …], end."""

    call: str
    """Before the arguments; {name} stands for the tool's."""
    call_end: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    is_single: bool = False
    """Whether what ends a call ends the answer."""
    arguments: Literal["json", "qwen", "glm", "python", "gemma"] = "json"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to call tools."""

    written: Written
    read: Callable[[Source], Reading[None]]
    openers: tuple[str, ...]
    """What calls begin with. Forced calls are written with the first."""
    closers: tuple[str, ...] = ()
    """What ends them even if what stands between is nothing that can be read."""
    bare: str = ""
    """What an answer begins with that is a call without an opener."""
    found_by: tuple[tuple[str, ...], ...] = ()
    """A template that has all of one of these is of this format."""
    marks: tuple[str, ...] = ()
    """Others that stand in a call, and may be special tokens; Gemma's quote first."""
    has_short_ids: bool = False
    """Whether ids of calls are 9 letters and digits: the template refuses others."""


# Of calls as objects.
_OBJECT = '{"name": "{name}", "arguments": '


def _json_list(begin: str) -> Written:
    return Written(_OBJECT, "}", begin=begin, separator=", ", end="]")


_TOOL_CALL = ("<tool_call>",)
_TOOL_CALL_END = ("</tool_call>",)
_DEEPSEEK = partial(
    ToolFormat, read=read_deepseek, openers=(DEEPSEEK_ALL,), closers=(DEEPSEEK_ALL_END,)
)


def _gemma(opener: str, closer: str, quote: str) -> ToolFormat:
    return ToolFormat(
        Written(f"{opener}call:{{name}}", closer, arguments="gemma"),
        read_gemma,
        openers=(opener,),
        closers=(closer,),
        found_by=((opener,),),
        marks=(quote,),
    )


# Those come first whose templates have the marks of others too.
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    HARMONY: ToolFormat(
        # What ends it is an end token.
        Written(
            "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
            "",
            is_single=True,
        ),
        read_json,
        openers=("<|channel|>",),
        found_by=(("<|channel|>", "<|message|>"),),
        marks=("<|start|>", "<|end|>", "<|return|>", "<|call|>"),
    ),
    "gemma4": _gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": _gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "deepseek_v3": _DEEPSEEK(
        Written(
            f"{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}{{name}}\n```json\n",
            f"\n```{DEEPSEEK_END}",
            begin=DEEPSEEK_ALL,
            separator="\n",
            end=DEEPSEEK_ALL_END,
        ),
        found_by=((DEEPSEEK_ALL, "```json"),),
    ),
    "deepseek_v31": _DEEPSEEK(
        Written(
            f"{DEEPSEEK_CALL}{{name}}{DEEPSEEK_SEPARATOR}",
            DEEPSEEK_END,
            begin=DEEPSEEK_ALL,
            end=DEEPSEEK_ALL_END,
        ),
        found_by=((DEEPSEEK_ALL,),),
    ),
    "mistral": ToolFormat(
        Written("[TOOL_CALLS]{name}[ARGS]", ""),
        read_mistral,
        openers=("[TOOL_CALLS]",),
        found_by=(("[TOOL_CALLS]", "[ARGS]"),),
        marks=("[CALL_ID]",),
        has_short_ids=True,
    ),
    "mistral_json": ToolFormat(
        _json_list("[TOOL_CALLS]["),
        read_mistral,
        openers=("[TOOL_CALLS]",),
        found_by=(("[TOOL_CALLS]",),),
        has_short_ids=True,
    ),
    "glm45": ToolFormat(
        Written("<tool_call>{name}\n", "</tool_call>", separator="\n", arguments="glm"),
        partial(read_tagged, tags=GLM_TAGS),
        openers=_TOOL_CALL,
        closers=_TOOL_CALL_END,
        found_by=(("<arg_key>",),),
        marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "qwen3_coder": ToolFormat(
        Written(
            "<tool_call>\n<function={name}>\n",
            "</function>\n</tool_call>",
            separator="\n",
            arguments="qwen",
        ),
        partial(read_tagged, tags=QWEN_TAGS),
        openers=("<tool_call>", "<function="),
        closers=_TOOL_CALL_END,
        found_by=(("<tool_call>", "<function=", "<parameter="),),
    ),
    "granite": ToolFormat(
        _json_list("<|tool_call|>["),
        read_json,
        openers=("<|tool_call|>",),
        found_by=(("<|tool_call|>",),),
    ),
    "hermes": ToolFormat(
        Written(f"<tool_call>\n{_OBJECT}", "}\n</tool_call>", separator="\n"),
        read_json,
        openers=_TOOL_CALL,
        closers=_TOOL_CALL_END,
        found_by=(("<tool_call>", '{"name"'), ("<tool_call>", "XML tags")),
    ),
    "lfm2": ToolFormat(
        Written(
            "{name}(",
            ")",
            begin="<|tool_call_start|>[",
            separator=", ",
            end="]<|tool_call_end|>",
            arguments="python",
        ),
        read_python,
        openers=("<|tool_call_start|>",),
        closers=("<|tool_call_end|>",),
        found_by=(("<|tool_call_start|>",), ("<|tool_list_start|>",)),
    ),
    "pythonic": ToolFormat(
        Written("{name}(", ")", begin="[", separator=", ", end="]", arguments="python"),
        read_python,
        openers=("<|python_tag|>",),
        bare="[",
        found_by=(("func_name1(",),),
    ),
    "llama3_json": ToolFormat(
        Written('{"name": "{name}", "parameters": ', "}", separator="; "),
        read_json,
        openers=("<|python_tag|>",),
        bare="{",
        found_by=(('"name": function name, "parameters": ',),),
    ),
}


class ReasoningFormat(NamedTuple):
    """The marks around a model's thoughts."""

    begin: str
    end: str
    dropped: tuple[str, ...] = ()
    """Marks around the answer that are no part of it."""
    found_by: tuple[tuple[str, ...], ...] = ()


REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    HARMONY: ReasoningFormat(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant",
        found_by=(("<|channel|>", "<|message|>"),),
    ),
    "gemma4": ReasoningFormat("<|channel>thought\n", "<channel|>", found_by=(("<|channel>",),)),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]", found_by=(("[THINK]",),)),
    "granite": ReasoningFormat(
        "<think>",
        "</think>",
        ("<response>", "</response>"),
        found_by=(("<think>", "<response>", "<|start_of_role|>"),),
    ),
    "think": ReasoningFormat("<think>", "</think>", found_by=(("<think>",), ("</think>",))),
}
REASONING_ALIASES = {
    **dict.fromkeys(("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "nemotron_v3"), "think"),
    "openai_gptoss": HARMONY,
    "gemma": "gemma4",
}
"""vLLM's names of rows of one kind."""
TOOL_ALIASES = {"gemma": "gemma4", "qwen3_xml": "qwen3_coder", "llama3": "llama3_json"}


def guess_format(
    template: str | None, formats: Mapping[str, ToolFormat | ReasoningFormat]
) -> str | None:
    """The first row whose marks a chat template has."""
    for name, row in formats.items():
        if template and any(all(mark in template for mark in marks) for marks in row.found_by):
            return name
    return None


def marks_of(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> str:
    """A text in which every mark stands that may be a special token."""
    texts: list[str] = []
    if tools is not None:
        written = tools.written
        texts += [*tools.openers, *tools.closers, *tools.marks]
        texts += [written.begin, written.call, written.call_end, written.end]
    if reasoning is not None:
        texts += [reasoning.begin, reasoning.end]
    return "\n".join(texts)
