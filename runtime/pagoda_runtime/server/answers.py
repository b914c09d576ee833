"""The bodies of answers: what is written, and what /openapi.json shows.

A field that is UNSET is left out.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from pagoda_runtime.ipc.messages import FinishReason


class PromptTokensDetails(Struct, frozen=True):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    """What the tokens of an answer were for."""

    reasoning_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of all choices, those included that are not shown. Details of the answer are told of
    models whose thoughts are known."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """One entry for each token; null for the first one of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(Struct, frozen=True):
    """A token and its logprob; bytes are those of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ShownTokenLogprobs(TokenLogprob, frozen=True):
    """A token of the text, with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct, frozen=True):
    """One entry for each token of the message."""

    content: list[ShownTokenLogprobs]
    refusal: None


class PromptLogprob(Struct, frozen=True):
    """A token in the place of one of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Head(Struct, frozen=True):
    """What most answers begin with, and every event of a stream of tokens."""

    id: str
    created: int
    model: str


class CompletionChoice(Struct, frozen=True):
    """prompt_logprobs, by token id, are null unless they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None


class Completion(Head, frozen=True, tag_field="object", tag="text_completion"):
    """The answer of POST /v1/completions in one piece."""

    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Struct, frozen=True):
    """stop_reason comes with finish_reason, in the last chunk of a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | UnsetType | None = UNSET


class CompletionChunk(Head, frozen=True, tag_field="object", tag="text_completion"):
    """An event of a streamed completion. choices is empty in the last one, which has the usage."""

    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


ChatFinishReason = FinishReason | Literal["tool_calls"]
"""tool_calls: the answer ended as it would with stop, and has calls."""


class FunctionCall(Struct, frozen=True):
    """What is called, with what: JSON as text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True, tag_field="type", tag="function"):
    """A call that the client is to carry out."""

    id: str
    function: FunctionCall


class AssistantMessage(Struct, frozen=True, tag_field="role", tag="assistant"):
    """What the model said; content is null beside calls if there is none."""

    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One of the n messages."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None


class ChatCompletion(Head, frozen=True, tag_field="object", tag="chat.completion"):
    """The answer of POST /v1/chat/completions in one piece."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None


class FunctionCallDelta(Struct):
    """What a chunk adds to a call; the first one has the name."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """What a chunk adds to one of the calls; the first one has id and type."""

    index: int
    function: FunctionCallDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True):
    """What a chunk adds to a message; the first one of a choice has the role."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """stop_reason comes with finish_reason, in the last chunk of a choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatCompletionChunk(Head, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """An event of a streamed chat. choices is empty in the last one, which has the usage."""

    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct, frozen=True, tag_field="object", tag="model"):
    """A name that requests may use; root is the model as it was given to the server."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Struct, frozen=True, tag_field="object", tag="list"):
    """All names; answers show the first."""

    data: list[Model]


class ErrorDetails(Struct, frozen=True):
    """What was wrong; param is the field that is to blame, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct, frozen=True):
    """The body of every answer from status 400 on, but for probes and /v1/messages."""

    error: ErrorDetails


class Running(Struct, frozen=True):
    """What runs, in the words of flags and of config.json, whatever was asked for; task is
    generate, embed or classify."""

    architecture: str
    quantization: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    task: str = "generate"


class Startup(Struct, frozen=True):
    """How far the model is loaded; once it is, what was loaded."""

    phase: str
    percent: float
    bytes_per_second: float
    eta_seconds: float | None = None
    """Until the phase ends; null where it is not known."""
    model: Running | UnsetType = UNSET


class Status(Struct, frozen=True):
    """`ok` or `ready`, else the reason against it."""

    status: str


class Load(Struct, frozen=True):
    """running counts sequences, as slots do; waiting every accepted request that does not run."""

    running: int
    waiting: int
    slots: int
    kv_usage: float
    preemptions_total: int
    finished_total: int


class Version(Struct, frozen=True):
    """Of Pagoda."""

    version: str


class Tokenized(Struct, frozen=True):
    """Tokens of a prompt; token_strs, as the vocabulary writes them, if they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Struct, frozen=True):
    """The text of tokens."""

    prompt: str
