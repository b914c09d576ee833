"""The body of POST /v1/responses, OpenAI's newer form of a chat, as the chat that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.blocks import Block
from pagoda_runtime.server.chat_protocol import (
    MAX_MESSAGES,
    ChatCompletionRequest,
    to_call,
    to_tool,
)
from pagoda_runtime.server.errors import validate
from pagoda_runtime.server.protocol import Body, Part, Small, Text, TextOr, only, tag_of_content

Message = dict[str, Any]


class InputText(Part):
    """Text of a message, of thoughts, or of a call's result."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: Text


Texts = TextOr[InputText]


class InputMessage(Part):
    """One message of the conversation; what the model said is of the role assistant."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts


class FunctionCallItem(Part):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class FunctionCallOutput(Part):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Texts


class ReasoningItem(Part):
    """What the model thought."""

    type: Literal["reasoning"]
    content: list[InputText] | None = None
    summary: list[InputText] = Field(default=[])


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind_of(item: Any) -> str:
    kind = item.get("type") or "message" if isinstance(item, dict) else "message"
    return f"[{kind}]"


InputItem = Annotated[
    Annotated[
        Annotated[InputMessage, Tag("[message]")]
        | Annotated[FunctionCallItem, Tag("[function_call]")]
        | Annotated[FunctionCallOutput, Tag("[function_call_output]")]
        | Annotated[ReasoningItem, Tag("[reasoning]")],
        Discriminator(_kind_of),
    ],
    only(f"items of {', '.join(_KINDS)}", *_KINDS, default="message"),
]


class ResponseTool(Part):
    """A function that the model may call; tools that run on OpenAI's servers are not served."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Part):
    """The tool that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(Part):
    """The form of the text: any, JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Part):
    """The form of the text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Part):
    """How much the model thinks; there are no summaries, thoughts come as they are."""

    effort: Text | None = None
    summary: Text | None = None
    generate_summary: Text | None = None


Input = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("list[part]")],
    Discriminator(tag_of_content),
]


class ResponsesRequest(Body):
    """The body of POST /v1/responses."""

    input: Input = ""
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: Small | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Text] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def verify(self) -> None:
        """Raise RequestError for fields that contradict each other."""
        if self.background and (self.stream or self.store is False):
            other = "stream" if self.stream else "store: false"
            raise RequestError(
                f"background goes with no {other} here; leave one of them out.", param="background"
            )

    def to_messages(self) -> list[Message]:
        """The input, without instructions, as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}] if self.input else []
        messages: list[Message] = []
        for item in self.input:
            add_item(messages, item)
        return messages

    def to_chat(self, messages: Sequence[Message]) -> ChatCompletionRequest:
        """The body of /v1/chat/completions that goes on with these messages."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *messages],
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
        }
        if self.tools:
            fields["tools"] = [to_tool(tool) for tool in self.tools]
            choice: Any = self.tool_choice
            if isinstance(choice, NamedFunction):
                choice = {"type": "function", "function": {"name": choice.name}}
            fields["tool_choice"] = choice
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _to_response_format(self.text.format)
        return validate(ChatCompletionRequest.model_validate, fields)


def add_item(messages: list[Message], item: InputItem) -> None:
    """Add an item; calls and thoughts go into the message of the assistant that they belong to."""
    match item:
        case InputMessage():
            content = _to_text(item.content)
            if item.role == "assistant" and _is_open(messages):
                messages[-1]["content"] = content
            else:
                messages.append({"role": item.role, "content": content})
        case FunctionCallOutput():
            output = _to_text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        case FunctionCallItem():
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            call = to_call(item.call_id, item.name, item.arguments)
            messages[-1].setdefault("tool_calls", []).append(call)
        case ReasoningItem():
            thoughts = _to_text(item.content or item.summary)
            messages.append({"role": "assistant", "reasoning_content": thoughts})


def to_input(block: Block) -> InputItem:
    """A block as the next request of the conversation has it."""
    match block.kind:
        case "text":
            return InputMessage(role="assistant", content=block.text)
        case "reasoning":
            return ReasoningItem(
                type="reasoning", content=[InputText(type="reasoning_text", text=block.text)]
            )
    return FunctionCallItem(
        type="function_call", call_id=block.call_id, name=block.name, arguments=block.text
    )


def _is_open(messages: Sequence[Message]) -> bool:
    """Whether the last message has only thoughts yet."""
    last = messages[-1] if messages else {}
    return set(last) == {"role", "reasoning_content"}


def _to_text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _to_response_format(text_format: TextFormat) -> dict[str, Any]:
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    schema = {"name": text_format.name or "answer", "schema": text_format.schema_ or {}}
    return {"type": "json_schema", "json_schema": {**schema, "strict": text_format.strict}}
