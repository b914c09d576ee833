"""The routes of a server: what they take and answer, for the document, metrics and keys."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct
from pydantic import BaseModel

from pagoda_runtime.server import (
    answers,
    chat_protocol,
    messages_answers,
    messages_protocol,
    pooling_answers,
    pooling_protocol,
    protocol,
    responses_answers,
    responses_protocol,
    tokens_protocol,
)

KEYED = ("/v1", "/tokenize", "/detokenize")
"""The paths that ask for a key where there are any, and all below them."""
# 4xx and 5xx of every route under /v1 that needs the model, and of those that take a body.
_LOADED = (401, 503)
_BODY = (400, 401, 404, 413, 429, 503)


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
    error: type[Struct] = answers.Error
    """What these statuses are answered with."""
    unready: bool = False
    """Whether 503 is answered with the same model."""

    @property
    def is_keyed(self) -> bool:
        return is_keyed(self.path)


DOCUMENTED = (
    Route("GET", "/startup", "How far the model is loaded", answers.Startup, unready=True),
    Route("GET", "/health", "Whether the engine works", answers.Status, unready=True),
    Route("GET", "/ready", "Whether requests should come here", answers.Status, unready=True),
    Route("GET", "/load", "Running and waiting requests", answers.Load),
    Route("GET", "/version", "Pagoda's version", answers.Version),
    Route("GET", "/metrics", "Metrics in Prometheus' text format", None),
    Route("GET", "/v1/models", "The served names", answers.ModelList, errors=_LOADED),
    Route("GET", "/v1/models/{model}", "One of them", answers.Model, errors=(*_LOADED, 404)),
    Route(
        "POST",
        "/v1/completions",
        "Continue prompts",
        answers.Completion,
        body=protocol.CompletionRequest,
        chunk=answers.CompletionChunk,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        answers.ChatCompletion,
        body=chat_protocol.ChatCompletionRequest,
        chunk=answers.ChatCompletionChunk,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/messages",
        "Answer a conversation, as Anthropic has it",
        messages_answers.Message,
        body=messages_protocol.MessagesRequest,
        events="message_start, content_block_start, content_block_delta, content_block_stop, "
        "message_delta and message_stop, or error where the answer breaks off, as Anthropic has "
        "them",
        errors=_BODY,
        error=messages_answers.AnthropicError,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        "The tokens of a conversation",
        messages_answers.CountedTokens,
        body=messages_protocol.CountTokensRequest,
        errors=_BODY,
        error=messages_answers.AnthropicError,
    ),
    Route(
        "POST",
        "/v1/responses",
        "Answer a conversation that the server remembers",
        responses_answers.Response,
        body=responses_protocol.ResponsesRequest,
        events="response.created, response.in_progress, those of each item, and "
        "response.completed, response.incomplete, or error and response.failed, as OpenAI has them",
        errors=_BODY,
    ),
    Route(
        "GET",
        "/v1/responses/{response_id}",
        "A response that is remembered",
        responses_answers.Response,
        errors=(400, 401, 404),
    ),
    Route(
        "DELETE",
        "/v1/responses/{response_id}",
        "Forget it",
        responses_answers.DeletedResponse,
        errors=(401, 404),
    ),
    Route(
        "POST",
        "/v1/responses/{response_id}/cancel",
        "End an answer that is made in the background",
        responses_answers.Response,
        errors=(400, 401, 404),
    ),
    Route(
        "POST",
        "/tokenize",
        "The tokens of a prompt",
        answers.Tokenized,
        body=tokens_protocol.TokenizeRequest,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/detokenize",
        "The text of tokens",
        answers.Detokenized,
        body=tokens_protocol.DetokenizeRequest,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/embeddings",
        "Vectors of texts",
        pooling_answers.EmbeddingList,
        body=pooling_protocol.EmbeddingRequest,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/score",
        "How well pairs of texts go together",
        pooling_answers.ScoreList,
        body=pooling_protocol.ScoreRequest,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/rerank",
        "Documents by how well they answer a query",
        pooling_answers.Reranking,
        body=pooling_protocol.RerankRequest,
        errors=_BODY,
    ),
    Route(
        "POST",
        "/v1/classify",
        "Classes of texts",
        pooling_answers.ClassificationList,
        body=pooling_protocol.ClassificationRequest,
        errors=_BODY,
    ),
)
ROUTES = (
    *(f"{route.method} {route.path}" for route in DOCUMENTED),
    "GET /openapi.json",
    "GET /docs",
    "GET /",
)
"""All of a server."""
