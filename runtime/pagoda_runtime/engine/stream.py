"""One request's stream of deltas inside the API process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec

from pagoda_runtime.engine.messages import RequestDelta
from pagoda_runtime.errors import EngineDead


class Mailbox:
    """Holds what the engine sent for a request until its stream takes it.

    Deltas that pile up become one, so a slow reader costs memory for its tokens alone.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._delta: RequestDelta | None = None
        self._error: str | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, delta: RequestDelta) -> None:
        if self._delta is None:
            self._delta = delta
        else:
            # The list is this mailbox's own since it was decoded; extending it copies nothing.
            token_ids, queue_seconds = self._delta.new_token_ids, self._delta.queue_seconds
            token_ids.extend(delta.new_token_ids)
            self._delta = msgspec.structs.replace(
                delta, new_token_ids=token_ids, queue_seconds=queue_seconds
            )
        self._wake_reader()

    def fail(self, message: str) -> None:
        self._error = message
        self._wake_reader()

    async def take(self) -> RequestDelta:
        """Wait for tokens. Raises EngineDead once all that came before the death is taken."""
        while self._delta is None:
            if self._error is not None:
                raise EngineDead(self._error)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        delta, self._delta = self._delta, None
        return delta

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class RequestStream(AsyncIterator[RequestDelta]):
    """The deltas of one request; the last one has a finish_reason.

    One task reads it. It is like an asynchronous generator (`aclose`, works with
    `contextlib.aclosing`), but the request is in the engine before the first delta is asked for.
    """

    def __init__(
        self, mailbox: Mailbox, loop: asyncio.AbstractEventLoop, abort: Callable[[str], None]
    ) -> None:
        self.request_id = mailbox.request_id
        self._mailbox = mailbox
        self._loop = loop
        self._abort = abort
        self._is_over = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        if self._is_over:
            raise StopAsyncIteration
        try:
            delta = await self._mailbox.take()
        except BaseException:
            await self.aclose()
            raise
        self._is_over = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.request_id)

    def __del__(self) -> None:
        # The collector may run on any thread, and after the loop has ended.
        if not self._is_over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, self.request_id)
