"""From the tokens of the engine to the text of choices, and several prompts as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from pagoda_runtime.errors import PagodaError
from pagoda_runtime.ipc.messages import RequestDelta, TokenLogprobs
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.server.choice import ChoiceText
from pagoda_runtime.server.logprobs import ShownToken
from pagoda_runtime.server.state import TokenStream


class TextDelta(msgspec.Struct, frozen=True):
    """What came for one choice: text that may be empty, and tokens."""

    index: int
    text: str
    num_tokens: int
    """What the engine generated behind a stop string, before it was told, is not counted."""
    tokens: list[ShownToken]
    """Those that the text shows, if logprobs were asked for."""
    finish_reason: str | None
    stop_reason: int | str | None
    cumulative_logprob: float | None


class Generation:
    """One prompt in the engine. It is there from the start; `close` aborts it if it still runs.

    Args:
        first_index: of its choices in the answer.
        is_scoring: no token was asked for; the one that the engine needs is not shown.
    """

    def __init__(
        self,
        stream: TokenStream,
        choices: Sequence[ChoiceText],
        clock: RequestClock,
        *,
        first_index: int = 0,
        is_scoring: bool = False,
    ) -> None:
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        """Of the prompt's second and later tokens."""
        self.num_cached_tokens = 0
        self._stream = stream
        self._choices = choices
        self._clock = clock
        self._first_index = first_index
        self._is_scoring = is_scoring
        self._num_open = len(choices)
        self._is_finished = False

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it comes; the last delta of a choice has a finish_reason. EngineDead."""
        reason = "abort"
        try:
            async for delta in self._stream:
                shown = self._take(delta)
                reason = shown.finish_reason or reason
                if not self._num_open:
                    await self.close(reason)
                yield shown
            await self.close(reason)
        except PagodaError:
            await self.close("error")
            raise
        finally:
            await self.close("abort")

    async def close(self, reason: str) -> None:
        """End it, in the engine too; only the first call counts."""
        if not self._is_finished:
            self._is_finished = True
            await self._stream.aclose()
            self._clock.finish(reason)

    def _take(self, delta: RequestDelta) -> TextDelta:
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        wanted = _without_tokens(delta) if self._is_scoring else delta
        choice = self._choices[delta.index]
        text, num_tokens, tokens = choice.push(wanted, self.prompt_logprobs)
        self._clock.observe(delta, num_tokens)
        if choice.finish_reason is not None:
            self._num_open -= 1
            if delta.finish_reason is None:
                self._stream.finish(delta.index)
        return TextDelta(
            self._first_index + delta.index,
            text,
            num_tokens,
            tokens,
            choice.finish_reason,
            choice.stop_reason,
            delta.cumulative_logprob
            if num_tokens == len(delta.new_token_ids)
            else _cumulative_logprob(delta, num_tokens),
        )


def _without_tokens(delta: RequestDelta) -> RequestDelta:
    reason = delta.finish_reason and "length"
    return RequestDelta(
        request_id=delta.request_id, index=delta.index, new_token_ids=[], finish_reason=reason
    )


def _cumulative_logprob(delta: RequestDelta, num_tokens: int) -> float | None:
    """Of a choice whose text ends behind the first num_tokens of the delta."""
    if delta.cumulative_logprob is None:
        return None
    return delta.cumulative_logprob - sum(t.logprob for t in (delta.logprobs or ())[num_tokens:])


async def close_all(generations: Sequence[Generation], reason: str = "abort") -> None:
    for generation in generations:
        await generation.close(reason)


def merge(generations: Sequence[Generation]) -> AsyncGenerator[TextDelta, None]:
    """The deltas of all prompts as they come. The first error ends all of them."""
    if len(generations) == 1:
        return generations[0].deltas()
    return _merge_several(generations)


async def _merge_several(generations: Sequence[Generation]) -> AsyncGenerator[TextDelta, None]:
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(maxsize=len(generations))

    async def pump(generation: Generation) -> None:
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(generation)) for generation in generations]
    try:
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        await close_all(generations)
