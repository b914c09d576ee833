"""The routes of a server: what they take and answer, for the document, metrics and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from pydantic import BaseModel

from pagoda_runtime.server import answers, responses_answers
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import is_anthropic
from pagoda_runtime.server.messages_answers import AnthropicError, CountedTokens, Message
from pagoda_runtime.server.messages_protocol import CountTokensRequest, MessagesRequest
from pagoda_runtime.server.pooling_answers import (
    ClassificationList,
    EmbeddingList,
    Reranking,
    ScoreList,
)
from pagoda_runtime.server.pooling_protocol import (
    ClassificationRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from pagoda_runtime.server.protocol import CompletionRequest
from pagoda_runtime.server.responses_protocol import ResponsesRequest
from pagoda_runtime.server.tokens_protocol import DetokenizeRequest, TokenizeRequest

KEYED = ("/v1", "/tokenize", "/detokenize")
"""The paths that ask for a key where there are any, and all below them."""
# 4xx and 5xx of every route that needs the model, of those that take a body, and of a response.
_LOADED = (401, 503)
_BODY = (400, 401, 404, 413, 429, 503)
_STORED = (400, 401, 404)
_RESPONSE = "/v1/responses/{response_id}"
_MESSAGE_EVENTS = (
    "message_start, content_block_start, content_block_delta, content_block_stop, message_delta "
    "and message_stop, or error where the answer breaks off, as Anthropic has them"
)
_RESPONSE_EVENTS = (
    "response.created, response.in_progress, those of each item, and response.completed, "
    "response.incomplete, or error and response.failed, as OpenAI has them"
)


def is_keyed(path: str) -> bool:
    """Whether a path asks for a key where there are any."""
    return f"{path}/".startswith(tuple(f"{prefix}/" for prefix in KEYED))


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. Its answer is JSON of a model, or else text."""

    method: str
    path: str
    summary: str
    answer: type[Struct] | None
    body: type[BaseModel] | None = None
    chunk: type[Struct] | None = None
    """An event of the stream that the body may ask for."""
    events: str = ""
    """What the events of that stream are, where they are of many kinds."""
    errors: tuple[int, ...] = ()
    unready: bool = False
    """Whether 503 is answered with the same model."""

    @property
    def is_keyed(self) -> bool:
        return is_keyed(self.path)

    @property
    def error(self) -> type[Struct]:
        """What `errors` are answered with."""
        return AnthropicError if is_anthropic(self.path) else answers.Error


def _post(
    path: str, summary: str, answer: type[Struct], body: type[BaseModel], **details: Any
) -> Route:
    return Route("POST", path, summary, answer, body, errors=_BODY, **details)


DOCUMENTED = (
    Route("GET", "/startup", "How far the model is loaded", answers.Startup, unready=True),
    Route("GET", "/health", "Whether the engine works", answers.Status, unready=True),
    Route("GET", "/ready", "Whether requests should come here", answers.Status, unready=True),
    Route("GET", "/load", "Running and waiting requests", answers.Load),
    Route("GET", "/version", "Pagoda's version", answers.Version),
    Route("GET", "/metrics", "Metrics in Prometheus' text format", None),
    Route("GET", "/v1/models", "The served names", answers.ModelList, errors=_LOADED),
    Route("GET", "/v1/models/{model}", "One of them", answers.Model, errors=(*_LOADED, 404)),
    _post(
        "/v1/completions",
        "Continue prompts",
        answers.Completion,
        CompletionRequest,
        chunk=answers.CompletionChunk,
    ),
    _post(
        "/v1/chat/completions",
        "Answer a conversation",
        answers.ChatCompletion,
        ChatCompletionRequest,
        chunk=answers.ChatCompletionChunk,
    ),
    _post(
        "/v1/messages",
        "Answer a conversation, as Anthropic has it",
        Message,
        MessagesRequest,
        events=_MESSAGE_EVENTS,
    ),
    _post(
        "/v1/messages/count_tokens",
        "The tokens of a conversation",
        CountedTokens,
        CountTokensRequest,
    ),
    _post(
        "/v1/responses",
        "Answer a conversation that the server remembers",
        responses_answers.Response,
        ResponsesRequest,
        events=_RESPONSE_EVENTS,
    ),
    Route(
        "GET",
        _RESPONSE,
        "A response that is remembered",
        responses_answers.Response,
        errors=_STORED,
    ),
    Route("DELETE", _RESPONSE, "Forget it", responses_answers.DeletedResponse, errors=(401, 404)),
    Route(
        "POST",
        f"{_RESPONSE}/cancel",
        "End an answer that is made in the background",
        responses_answers.Response,
        errors=_STORED,
    ),
    _post("/tokenize", "The tokens of a prompt", answers.Tokenized, TokenizeRequest),
    _post("/detokenize", "The text of tokens", answers.Detokenized, DetokenizeRequest),
    _post("/v1/embeddings", "Vectors of texts", EmbeddingList, EmbeddingRequest),
    _post("/v1/score", "How well pairs of texts go together", ScoreList, ScoreRequest),
    _post("/v1/rerank", "Documents by how well they answer a query", Reranking, RerankRequest),
    _post("/v1/classify", "Classes of texts", ClassificationList, ClassificationRequest),
)
ROUTES = (
    *(f"{route.method} {route.path}" for route in DOCUMENTED),
    "GET /openapi.json",
    "GET /docs",
    "GET /",
)
"""All of a server."""
