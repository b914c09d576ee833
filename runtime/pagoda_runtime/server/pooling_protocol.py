"""The bodies of requests for vectors, scores and classes, in OpenAI's, Jina's and vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from pagoda_runtime.server.protocol import Body, Part, Priority, Prompts, Small, Text, Truncation

MAX_DOCUMENTS = 8192
Texts = Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class PoolingRequest(Body):
    """The fields that all of them share."""

    truncate_prompt_tokens: Truncation | None = None
    priority: Priority | None = None
    user: str | None = None


class EmbeddingRequest(PoolingRequest):
    """The body of POST /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Small, Field(ge=1)] | None = None
    prompt_name: Text | None = None
    input_type: Text | None = None


class ClassificationRequest(PoolingRequest):
    """The body of POST /v1/classify."""

    input: Prompts
    use_activation: bool | None = None


class ScoreRequest(PoolingRequest):
    """The body of POST /v1/score: one text with each of others, or as many with as many."""

    text_1: Annotated[Texts, Field(validation_alias=AliasChoices("text_1", "queries"))]
    text_2: Annotated[Texts, Field(validation_alias=AliasChoices("text_2", "documents"))]


class Document(Part):
    """A document as an object."""

    text: Text


class RerankRequest(PoolingRequest):
    """The body of POST /v1/rerank."""

    query: Text
    documents: Annotated[
        list[Text | Document], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)
    ]
    top_n: Annotated[Small, Field(ge=1)] | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        return [each if isinstance(each, str) else each.text for each in self.documents]
