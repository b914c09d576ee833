"""The body of POST /v1/chat/completions: messages, tools, and what else a chat has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pagoda_runtime.sampling_params import MAX_LOGPROBS
from pagoda_runtime.server.protocol import (
    GenerationRequest,
    OpenPart,
    Part,
    Small,
    Text,
    TextOr,
    only,
)

MAX_MESSAGES = 2048
MAX_TOOLS = 256


class TextPart(Part):
    """The only kind of content part that a text model takes."""

    type: Literal["text"]
    text: Text


Content = TextOr[Annotated[TextPart, only("text parts", "text", default="text")]]


class CalledFunction(OpenPart):
    """What was called, with what: a JSON object as text."""

    name: Text
    arguments: Text


class ToolCall(OpenPart):
    """A call that the model made."""

    id: Annotated[Text, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(OpenPart):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """Another name of the same."""

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def num_characters(self) -> int:
        calls = (call.function for call in self.tool_calls or ())
        num_of_calls = sum(len(call.name) + len(call.arguments) for call in calls)
        return len(self.text) + len(self.thoughts) + num_of_calls


class Function(OpenPart):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments; none: it takes none."""
    strict: bool | None = None


class Tool(OpenPart):
    """A tool; all of them are functions."""

    type: Literal["function"]
    function: Function


def to_tool(function: Part) -> dict[str, Any]:
    """A function of another form of the API as a tool; fields have the names of Function's."""
    values = function.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": values}


def to_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as messages of chats have it."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


class FunctionName(OpenPart):
    """The name of one of the tools."""

    name: Text


class NamedTool(OpenPart):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


def _tag_of_choice(choice: Any) -> str:
    return "named[tool]" if isinstance(choice, (dict, NamedTool)) else "[choice]"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[choice]")]
    | Annotated[NamedTool, Tag("named[tool]")],
    Discriminator(_tag_of_choice),
]


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Small | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def asked_tokens(self) -> int | None:
        completion = self.max_completion_tokens
        return self.max_tokens if completion is None else completion

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def callable_tools(self) -> list[Function]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def forced_tools(self) -> list[Function]:
        """Those of which one must be called, if one must."""
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool for tool in self.callable_tools if name in (None, tool.name)]

    def calls(self) -> Iterator[tuple[str, ToolCall]]:
        """The calls of the conversation so far, each with its path."""
        for number, message in enumerate(self.messages):
            for index, call in enumerate(message.tool_calls or ()):
                yield f"messages[{number}].tool_calls[{index}]", call
