"""What the offline class does with models that embed, score or classify texts."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.client.pooling import (
    POOLING_PARAMS,
    find_prompt,
    pooler_of,
    score_pairs,
    scorer_of,
    to_probabilities,
    to_vector,
    verify_dimensions,
)
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.ipc.messages import EngineReady, EngineRequest
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")
Texts = str | Sequence[str]


class PooledLLM:
    """The part of `LLM` for such models."""

    facts: EngineReady
    config: EngineConfig
    _tokenizer: Tokenizer
    _request_numbers: Iterator[int]

    def embed(
        self,
        texts: Texts,
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> list[array[float]]:
        """The vector of each text, in fp32.

        Args:
            prompt_name: of the model's prompts, which stands before each text.
            dimensions: numbers of a vector, where the model says that it may be cut.
            truncate: whether only the beginning of a text that is too long is used.
        Raises: RequestError: a text is too long, or the model is for something else; EngineDead.
        """
        pooler = pooler_of(self.facts, "embed")
        verify_dimensions(dimensions, pooler)
        prompt = find_prompt(pooler, prompt_name, None)
        pooled = self._pool([(prompt + text,) for text in _as_list(texts)], truncate)
        return [to_vector(numbers, pooler, dimensions) for numbers in pooled]

    def classify(self, texts: Texts, *, truncate: bool = False) -> list[list[float]]:
        """Of each text the probabilities of the classes `facts.pooler.labels`. Raises as embed."""
        pooler = pooler_of(self.facts, "classify")
        pooled = self._pool([(text,) for text in _as_list(texts)], truncate)
        return [to_probabilities(numbers, pooler) for numbers in pooled]

    def score(self, text_1: Texts, text_2: Texts, *, truncate: bool = False) -> list[float]:
        """How well each pair goes together; a single text_1 goes with each of text_2.

        It is a cross-encoder's probability, or the cosine of two vectors. Raises as embed.
        """
        pooler = scorer_of(self.facts)
        inputs, finish = score_pairs(pooler, _as_list(text_1), _as_list(text_2))
        return finish(self._pool(inputs, truncate))

    def _pool(self, inputs: Sequence[tuple[str, ...]], truncate: bool) -> list[bytes]:
        client = self._open_client()
        limit = self.facts.max_model_len if truncate else None
        encoded = [self._tokenizer.encode_texts(*texts, max_tokens=limit) for texts in inputs]
        # All are verified before the first one runs.
        requests = [
            client.make_request(
                f"pool-{next(self._request_numbers)}",
                token_ids,
                POOLING_PARAMS,
                second_text_start=second_text_start,
            )
            for token_ids, second_text_start in encoded
        ]
        return self._run(_pool_all(client, requests, self.config))

    def _open_client(self) -> EngineClient:
        raise NotImplementedError

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        raise NotImplementedError


async def _pool_all(
    client: EngineClient, requests: Sequence[EngineRequest], config: EngineConfig
) -> list[bytes]:
    async def finish(request: EngineRequest) -> bytes:
        delta = await anext(client.generate(request))
        assert delta.pooled is not None
        return delta.pooled

    return await finish_all(config, requests, finish)


async def finish_all(
    config: EngineConfig, requests: Sequence[T], finish: Callable[[T], Awaitable[R]]
) -> list[R]:
    """The results, in order; where one fails, the others are ended."""
    # The rest waits here: the engine's own queue would refuse it.
    places = asyncio.Semaphore(config.max_num_seqs + config.max_num_waiting)

    async def finish_one(request: T) -> R:
        async with places:
            return await finish(request)

    tasks = [asyncio.create_task(finish_one(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _as_list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
