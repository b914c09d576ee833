"""The bodies of answers of /v1/responses, as OpenAI has them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """Text of the model; annotations and logprobs are empty."""

    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """Thoughts of the model."""

    text: str


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """What the model said."""

    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a tool; arguments are a JSON text."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thought; the summary is empty."""

    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputTokensDetails(Struct, frozen=True):
    """Where the tokens of the input came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Struct, frozen=True):
    """What the tokens of the output were for."""

    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    """Tokens, those of earlier responses in the input included."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    """Why it failed."""

    code: str
    message: str


class IncompleteDetails(Struct, frozen=True):
    """Why it is incomplete."""

    reason: Literal["max_output_tokens"]


class Response(Struct, frozen=True, tag_field="object", tag="response"):
    """What came of a request, and what it asked for."""

    id: str
    created_at: int
    status: ResponseStatus
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class DeletedResponse(Struct, frozen=True, tag_field="object", tag="response"):
    """A response that is forgotten."""

    id: str
    deleted: bool
