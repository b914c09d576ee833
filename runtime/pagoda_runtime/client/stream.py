"""One request's stream of deltas inside the API process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from pagoda_runtime.errors import EngineDead, RequestError
from pagoda_runtime.ipc.messages import RequestDelta


@dataclass(slots=True)
class Mailbox:
    """Holds what the engine sent for a request until its stream takes it.

    Deltas of a choice that pile up become one, so a slow reader costs memory for its tokens alone.
    """

    request_id: str
    num_sequences: int = 1
    """Sequences that run for the request at once."""
    is_complete: bool = False
    """Whether the engine sent the last delta of the request."""
    _deltas: dict[int, RequestDelta] = field(default_factory=dict)
    """By choice, in the order in which they began to wait."""
    _error: str | None = None
    _has_changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, delta: RequestDelta) -> None:
        self.is_complete = self.is_complete or delta.is_last
        held = self._deltas.get(delta.index)
        self._deltas[delta.index] = delta if held is None else held.join(delta)
        self._has_changed.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be taken."""
        return self.is_complete and not self._deltas

    def fail(self, message: str) -> None:
        self._error = message
        self._has_changed.set()

    async def take(self) -> RequestDelta:
        """Wait for tokens. Raises EngineDead once all that came before the death is taken."""
        while not self._deltas:
            if self._error is not None:
                raise EngineDead(self._error)
            self._has_changed.clear()
            await self._has_changed.wait()
        return self._deltas.pop(next(iter(self._deltas)))


class RequestStream(AsyncIterator[RequestDelta]):
    """The deltas of one request; the last one of each choice has a finish_reason.

    One task reads it until it ends: deltas that piled up come by choice, so others may follow one
    that is_last. Where the engine cannot go on it raises RequestError, or EngineDead. It is like an
    asynchronous generator (`aclose`, works with `contextlib.aclosing`), but the request is in the
    engine before the first delta is asked for.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        loop: asyncio.AbstractEventLoop,
        num_choices: int,
        *,
        abort: Callable[[str], None],
        finish: Callable[[str, int], None],
    ) -> None:
        self.request_id = mailbox.request_id
        self._mailbox = mailbox
        self._loop = loop
        self._abort = abort
        self._finish = finish
        self._open = set(range(num_choices))
        self._is_over = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        while not self._is_over:
            try:
                delta = await self._mailbox.take()
            except BaseException:
                await self.aclose()
                raise
            if delta.error is not None:
                await self.aclose()
                raise RequestError(delta.error)
            # What the engine sent before it learned that a choice is finished is passed over.
            is_wanted = delta.index in self._open
            if delta.finish_reason is not None:
                self._open.discard(delta.index)
            if not self._open or self._mailbox.is_over:
                self._end()
            if is_wanted:
                return delta
        raise StopAsyncIteration

    def finish(self, index: int) -> None:
        """Want no more of a choice; the request is over with the last one."""
        if self._is_over or index not in self._open:
            return
        self._open.discard(index)
        if self._open:
            self._finish(self.request_id, index)
        else:
            self._end()

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        if not self._is_over:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        # The engine does not know of choices that ended here alone.
        if not self._mailbox.is_complete:
            self._abort(self.request_id)

    def __del__(self) -> None:
        # The collector may run on any thread, and after the loop has ended.
        if not self._is_over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, self.request_id)
