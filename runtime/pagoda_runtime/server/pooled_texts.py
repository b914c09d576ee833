"""The texts of a request through the engine: tokenized, computed, and their numbers back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pagoda_runtime.client.pooling import POOLING_PARAMS
from pagoda_runtime.errors import PagodaError, PromptTooLong
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.server.generation import InEngine, close_all
from pagoda_runtime.server.pooling_answers import PoolingUsage
from pagoda_runtime.server.pooling_protocol import PoolingRequest
from pagoda_runtime.server.prompts import CHARACTERS_PER_TOKEN, CUT_TOKENS
from pagoda_runtime.server.protocol import AS_MANY_AS_FIT
from pagoda_runtime.server.state import ServerState

Input = tuple[str, ...] | list[int]
"""A text, a pair, or token ids."""


@dataclass(frozen=True, slots=True)
class PooledTexts:
    """What the engine made of the texts, in their order."""

    numbers: list[bytes]
    usage: PoolingUsage


class _Text(InEngine):
    """One text in the engine."""

    async def take(self) -> bytes:
        try:
            delta = await anext(self.stream)
        except PagodaError:
            await self.close("error")
            raise
        self.clock.observe(delta, 0)
        assert delta.pooled is not None
        await self.close("stop")
        return delta.pooled


async def pool(
    state: ServerState, body: PoolingRequest, inputs: Sequence[Input], arrival: float
) -> PooledTexts:
    """Tokenize and compute them.

    Args:
        arrival: time.monotonic() at which the request came.
    Raises: RequestError, QueueFull, EngineDead.
    """
    state.verify_places(len(inputs), f"{len(inputs)} texts", "input")
    texts: list[_Text] = []
    name = f"pool-{uuid.uuid4().hex}"
    try:
        with state.tokenizing(len(inputs)) as enter:
            encoded = await _encode(state, body, inputs)
            for number, (token_ids, second_text_start) in enumerate(encoded):
                enter()
                request = state.engine.make_request(
                    f"{name}-{number}",
                    token_ids,
                    POOLING_PARAMS,
                    priority=body.priority or 0,
                    second_text_start=second_text_start,
                )
                clock = RequestClock(state.metrics, arrival, len(token_ids), 0)
                texts.append(_Text(state.engine.generate(request), clock))
        num_tokens = sum(len(token_ids) for token_ids, _ in encoded)
        usage = PoolingUsage(num_tokens, num_tokens)
        return PooledTexts([await text.take() for text in texts], usage)
    finally:
        await close_all(texts)


async def _encode(
    state: ServerState, body: PoolingRequest, inputs: Sequence[Input]
) -> list[tuple[list[int], int]]:
    """Token ids of each, and where a second text begins."""
    ready, tokenizer = state.loaded()
    limit, kept = ready.max_model_len, body.truncate_prompt_tokens
    if kept is not None:
        kept = limit if kept == AS_MANY_AS_FIT else min(kept, limit)
    num_characters = sum(map(_num_characters, inputs))
    most = tokenizer.longest_token * (limit if kept is None else kept + CUT_TOKENS)
    found = []
    for number, each in enumerate(inputs):
        if number:
            # Many texts must not hold up the streams of others.
            await asyncio.sleep(0)
        if isinstance(each, list):
            found.append((each[:kept], 0))
            continue
        texts = each if kept is None else tuple(text[:most] for text in each)
        if kept is None and (length := sum(map(len, texts))) > most:
            raise PromptTooLong(
                f"A text has {length} characters; at most {most} can fit, because max_model_len is "
                f"{limit} tokens and the longest one has {tokenizer.longest_token} characters. "
                "Shorten it, or set truncate_prompt_tokens.",
                param="input",
            )
        encode = partial(tokenizer.encode_texts, *texts, max_tokens=kept)
        found.append(await state.off_loop(_num_characters(each), encode, num_characters))
    return found


def _num_characters(text: Input) -> int:
    return sum(map(len, text)) if isinstance(text, tuple) else CHARACTERS_PER_TOKEN * len(text)
