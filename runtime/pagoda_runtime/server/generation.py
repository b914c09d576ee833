"""The prompts of a request in the engine, and their text as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from pagoda_runtime.client.output_processor import OutputProcessor, TextDelta
from pagoda_runtime.client.stream import RequestStream
from pagoda_runtime.errors import PagodaError
from pagoda_runtime.ipc.messages import RequestDelta
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.server.tasks import running


@dataclass(slots=True)
class InEngine:
    """One prompt in the engine. It is there from the start; `close` aborts it if it still runs."""

    stream: RequestStream
    clock: RequestClock
    is_finished: bool = field(default=False, init=False)

    async def close(self, reason: str) -> None:
        """End it, in the engine too; only the first call counts."""
        if not self.is_finished:
            self.is_finished = True
            await self.stream.aclose()
            self.clock.finish(reason)


@dataclass(slots=True)
class Generation(InEngine):
    """A prompt that is gone on with."""

    outputs: OutputProcessor
    is_scoring: bool = False
    """No token was asked for; the one that the engine needs is not shown."""

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it comes; the last delta of a choice has a finish_reason. EngineDead."""
        outputs, reason = self.outputs, "abort"
        try:
            async for delta in self.stream:
                shown = outputs.take(_without_tokens(delta) if self.is_scoring else delta)
                self.clock.observe(delta, len(shown.token_ids))
                if shown.finish_reason is not None:
                    reason = shown.finish_reason
                    if delta.finish_reason is None:
                        self.stream.finish(delta.index)
                    if not outputs.num_open:
                        await self.close(reason)
                yield shown
            await self.close(reason)
        except PagodaError:
            await self.close("error")
            raise
        finally:
            await self.close("abort")


def _without_tokens(delta: RequestDelta) -> RequestDelta:
    return msgspec.structs.replace(
        delta,
        new_token_ids=[],
        logprobs=None,
        finish_reason=delta.finish_reason and "length",
        stop_reason=None,
        cumulative_logprob=None,
    )


async def close_all(prompts: Sequence[InEngine], reason: str = "abort") -> None:
    for prompt in prompts:
        await prompt.close(reason)


def merge(generations: Sequence[Generation]) -> AsyncGenerator[TextDelta, None]:
    """The deltas of all prompts as they come. The first error ends all of them, and so does their
    end, whatever it is."""
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

    try:
        async with running(*map(pump, generations)):
            num_open = len(generations)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
    finally:
        # Those whose pump had no time to begin.
        await close_all(generations)
