"""The answers with vectors, scores and classes: what is written, and what /openapi.json shows."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from pagoda_runtime.server.answers import Head


class PoolingUsage(Struct, frozen=True):
    """Tokens of all texts, special ones included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True, tag_field="object", tag="embedding"):
    """A text's vector: numbers, or the base64 of little-endian fp32."""

    index: int
    embedding: list[float] | str


class EmbeddingList(Struct, frozen=True, tag_field="object", tag="list"):
    """The answer of POST /v1/embeddings, in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: PoolingUsage


class Score(Struct, frozen=True, tag_field="object", tag="score"):
    """Of a pair: a probability of the model's, or the cosine of two vectors."""

    index: int
    score: float


class ScoreList(Head, frozen=True, tag_field="object", tag="list"):
    """The answer of POST /v1/score, in the order of the pairs."""

    data: list[Score]
    usage: PoolingUsage


class RankedDocument(Struct, frozen=True):
    """A document as it was sent."""

    text: str


class Ranked(Struct, frozen=True):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class Reranking(Struct, frozen=True):
    """The answer of POST /v1/rerank, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PoolingUsage


class Classification(Struct, frozen=True):
    """The likeliest label, and what each has."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationList(Head, frozen=True, tag_field="object", tag="list"):
    """The answer of POST /v1/classify, in the order of the texts."""

    data: list[Classification]
    usage: PoolingUsage
