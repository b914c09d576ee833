"""From the tokens of the engine to the text of one choice, and several choices as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from pagoda_runtime.engine.detokenizer import IncrementalDetokenizer
from pagoda_runtime.errors import PagodaError
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.state import ServerState, Tokenizer, TokenStream


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What came for one choice: text that may be empty, and tokens that were counted."""

    index: int
    text: str
    num_tokens: int
    num_cached_tokens: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One prompt in the engine. It is there from the start; `close` aborts it if it still runs."""

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        detokenizer: IncrementalDetokenizer,
        clock: RequestClock,
    ) -> None:
        self.index = index
        self._stream = stream
        self._detokenizer = detokenizer
        self._clock = clock
        self._is_finished = False
        self._num_cached_tokens = 0

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it comes; the last delta has a finish_reason. Raises EngineDead."""
        detokenizer = self._detokenizer
        try:
            async for delta in self._stream:
                self._clock.observe(delta)
                self._num_cached_tokens = delta.num_cached_tokens or self._num_cached_tokens
                text = detokenizer.push(delta.new_token_ids)
                reason, stop_reason = delta.finish_reason, delta.stop_reason
                if detokenizer.stopped_by is not None:
                    reason, stop_reason = "stop", detokenizer.stopped_by
                elif reason is not None:
                    text += detokenizer.finish()
                    if detokenizer.stopped_by is not None:
                        reason, stop_reason = "stop", detokenizer.stopped_by
                if reason is not None:
                    await self.close(reason)
                yield TextDelta(
                    self.index,
                    text,
                    len(delta.new_token_ids),
                    self._num_cached_tokens,
                    reason,
                    stop_reason,
                )
                if reason is not None:
                    return
        except PagodaError:
            await self.close("error")
            raise
        finally:
            await self.close("abort")

    async def close(self, reason: str) -> None:
        """End the choice, in the engine too; only the first call counts."""
        if not self._is_finished:
            self._is_finished = True
            await self._stream.aclose()
            self._clock.finish(reason)


async def start_choices(
    state: ServerState,
    tokenizer: Tokenizer,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    sampling_params: Sequence[SamplingParams],
    arrival: float,
) -> list[Choice]:
    """Hand every prompt to the engine; if it refuses one, it gets none of them."""
    choices: list[Choice] = []
    try:
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            stream = state.engine.generate(f"{request_id}-{index}", prompt, params)
            clock = RequestClock(
                state.metrics,
                arrival,
                num_prompt_tokens=len(prompt),
                max_tokens=params.max_tokens or 0,
            )
            detokenizer = IncrementalDetokenizer(tokenizer, params, prompt_token_ids=prompt)
            choices.append(Choice(index, stream, detokenizer, clock))
    except BaseException:
        await close_choices(choices, "error")
        raise
    return choices


async def close_choices(choices: Sequence[Choice], reason: str = "abort") -> None:
    for choice in choices:
        await choice.close(reason)


async def merge(choices: Sequence[Choice]) -> AsyncGenerator[TextDelta, None]:
    """The deltas of all choices as they come. The first error ends all of them."""
    if len(choices) == 1:
        async with aclosing(choices[0].deltas()) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(maxsize=len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(choice.deltas()) as deltas:
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
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
        await close_choices(choices)
