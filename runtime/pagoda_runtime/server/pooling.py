"""The routes of models that embed, score or classify texts."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from msgspec import UNSET, Raw
from msgspec.json import encode
from starlette.routing import Route

from pagoda_runtime.client.pooling import (
    find_prompt,
    pooler_of,
    score_pairs,
    scorer_of,
    to_bytes,
    to_probabilities,
    to_vector,
    verify_dimensions,
)
from pagoda_runtime.errors import RequestError
from pagoda_runtime.server import pooling_answers as answers
from pagoda_runtime.server.body import read_body
from pagoda_runtime.server.openai import make_answer
from pagoda_runtime.server.pooled_texts import Input, PooledTexts, pool
from pagoda_runtime.server.pooling_protocol import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from pagoda_runtime.server.protocol import Prompt
from pagoda_runtime.server.state import ServerState

Handler = Callable[[ServerState, Any, float], Awaitable[Any]]
"""The answer to a body that came at time.monotonic(). Raises what `errors.to_api_error` takes."""


def make_routes(state: ServerState) -> list[Route]:
    """POST /v1/embeddings, /v1/score, /v1/rerank and /v1/classify."""
    handlers: dict[str, tuple[type[PoolingRequest], Handler]] = {
        "/v1/embeddings": (EmbeddingRequest, embed),
        "/v1/score": (ScoreRequest, score),
        "/v1/rerank": (RerankRequest, rerank),
        "/v1/classify": (ClassificationRequest, classify),
    }
    return [
        make_answer(
            state,
            path,
            partial(read_body, state, body_class),
            partial(handler, state),
            lambda ready: pooler_of(ready, "embed", "classify"),
        )
        for path, (body_class, handler) in handlers.items()
    ]


async def embed(
    state: ServerState, body: EmbeddingRequest, arrival: float
) -> answers.EmbeddingList:
    """A vector for each text."""
    ready, _ = state.loaded()
    pooler = pooler_of(ready, "embed")
    verify_dimensions(body.dimensions, pooler)
    asked = body.prompt_name if body.prompt_name is not None else body.input_type
    if asked is not None and not all(isinstance(text, str) for text in body.input):
        raise RequestError(
            "A prompt is written before texts, and input holds token ids. Leave prompt_name and "
            "input_type out, or send texts.",
            param="input",
        )
    prompt = find_prompt(pooler, body.prompt_name, body.input_type)
    pooled = await pool(state, body, [_input(text, prompt) for text in body.input], arrival)
    data: list[Any] = []
    for index, numbers in enumerate(pooled.numbers):
        vector = to_vector(numbers, pooler, body.dimensions)
        is_base64 = body.encoding_format == "base64"
        shown = base64.b64encode(to_bytes(vector)).decode() if is_base64 else vector.tolist()
        # Thousands of vectors are a second's work, in which the streams of others are to go on.
        data.append(Raw(encode(answers.Embedding(index, shown))))
        await asyncio.sleep(0)
    return answers.EmbeddingList(data, _model(state, body), pooled.usage)


async def classify(
    state: ServerState, body: ClassificationRequest, arrival: float
) -> answers.ClassificationList:
    """The probabilities of the classes for each text."""
    ready, _ = state.loaded()
    pooler = pooler_of(ready, "classify")
    pooled = await pool(state, body, [_input(text) for text in body.input], arrival)
    data = []
    for index, numbers in enumerate(pooled.numbers):
        shown = to_probabilities(numbers, pooler, activates=body.use_activation is not False)
        label = pooler.labels[max(range(pooler.size), key=shown.__getitem__)]
        data.append(answers.Classification(index, label, shown, pooler.size))
    return answers.ClassificationList(*_head(state, body, "classify"), data, pooled.usage)


async def score(state: ServerState, body: ScoreRequest, arrival: float) -> answers.ScoreList:
    """A score for each pair."""
    first, second = (
        [texts] if isinstance(texts, str) else texts for texts in (body.text_1, body.text_2)
    )
    scores, pooled = await _score(state, body, first, second, arrival)
    data = [answers.Score(index, each) for index, each in enumerate(scores)]
    return answers.ScoreList(*_head(state, body, "score"), data, pooled.usage)


async def rerank(state: ServerState, body: RerankRequest, arrival: float) -> answers.Reranking:
    """The documents that go with the query best."""
    texts = body.texts
    scores, pooled = await _score(state, body, [body.query], texts, arrival)
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    has_documents = body.return_documents is not False
    results = [
        answers.Ranked(
            index, scores[index], answers.RankedDocument(texts[index]) if has_documents else UNSET
        )
        for index in order[: body.top_n]
    ]
    name, _, model = _head(state, body, "rerank")
    return answers.Reranking(name, model, results, pooled.usage)


async def _score(
    state: ServerState, body: PoolingRequest, first: list[str], second: list[str], arrival: float
) -> tuple[list[float], PooledTexts]:
    """Of each pair; a single first text goes with each of the second."""
    ready, _ = state.loaded()
    inputs, finish = score_pairs(scorer_of(ready), first, second)
    pooled = await pool(state, body, inputs, arrival)
    return finish(pooled.numbers), pooled


def _input(text: Prompt, prompt: str = "") -> Input:
    return (prompt + text,) if isinstance(text, str) else text


def _model(state: ServerState, body: PoolingRequest) -> str:
    return body.model or state.model_names[0]


def _head(state: ServerState, body: PoolingRequest, kind: str) -> tuple[str, int, str]:
    return f"{kind}-{uuid.uuid4().hex}", int(time.time()), _model(state, body)
