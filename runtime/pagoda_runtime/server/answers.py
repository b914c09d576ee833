"""The bodies of answers, as /openapi.json shows them.

They are written by `answer`, `streaming` and `logprobs` without these classes, which would cost a
stream its speed; a test compares the two.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all choices, those included that are not shown."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """One entry for each token; null for the first one of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(BaseModel):
    """A token and its logprob; bytes are those of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ShownTokenLogprobs(TokenLogprob):
    """A token of the text, with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token of the message."""

    content: list[ShownTokenLogprobs]
    refusal: None


class PromptLogprob(BaseModel):
    """A token in the place of one of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "abort"]


class CompletionChoice(BaseModel):
    """prompt_logprobs, by token id, are null unless they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """The answer of POST /v1/completions in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(BaseModel):
    """stop_reason comes with finish_reason, in the last chunk of a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class CompletionChunk(BaseModel):
    """An event of a streamed completion. choices is empty in the last one, which has the usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One of the n messages."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Delta(BaseModel):
    """What a chunk adds to a message; the first one of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """stop_reason comes with finish_reason, in the last chunk of a choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed chat. choices is empty in the last one, which has the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A name that requests may use; root is the model as it was given to the server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """All names; answers show the first."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetails(BaseModel):
    """What was wrong; param is the field that is to blame, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every answer from status 400 on, but for probes."""

    error: ErrorDetails


class Startup(BaseModel):
    """How far the model is loaded."""

    phase: str
    percent: float
    bytes_per_second: float


class Status(BaseModel):
    """`ok` or `ready`, else the reason against it."""

    status: str


class Load(BaseModel):
    """running counts sequences, as slots do; waiting every accepted request that does not run."""

    running: int
    waiting: int
    slots: int
    kv_usage: float
    preemptions_total: int
    finished_total: int


class Version(BaseModel):
    """Of Pagoda."""

    version: str
