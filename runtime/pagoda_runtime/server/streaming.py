"""Server-sent events, for as long as a client listens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagoda_runtime.server.access import RAW_SEND
from pagoda_runtime.server.errors import ApiError, to_api_error
from pagoda_runtime.server.tasks import running

logger = logging.getLogger("pagoda.server")

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # A proxy that collects the answer would turn the stream into one block.
    (b"x-accel-buffering", b"no"),
]


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client goes, which raises ClientDisconnect.

    The body must have been read.
    """
    task = asyncio.current_task()
    assert task is not None
    num_cancels, is_gone = task.cancelling(), False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    try:
        async with running(watch()):
            yield
    except asyncio.CancelledError:
        # As asyncio.timeout has it: who else cancels this task is to be heard.
        if is_gone and task.uncancel() <= num_cancels:
            raise ClientDisconnect from None
        raise


@dataclass(slots=True)
class EventStream(Response):
    """Sends chunks until they end or the client goes; then everything is closed, at once."""

    chunks: AsyncGenerator[bytes, None]
    end: Callable[[ApiError | None], bytes]
    """The last bytes, also of a stream that fails."""
    close: Callable[[], Awaitable[None]]
    """Called even if no chunk was ever asked for, when `chunks` cannot clean up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with while_connected(receive):
                await self._send_all(send, scope.get(RAW_SEND, send))
        except ClientDisconnect:
            logger.debug("A client left its stream.")
        finally:
            await self.chunks.aclose()
            await self.close()

    async def _send_all(self, send: Send, send_body: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            async for chunk in self.chunks:
                await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
            last = self.end(None)
        except Exception as error:
            # The status is sent; clients know an error by this event.
            api_error = to_api_error(error)
            if api_error.status == 500:
                logger.error("A stream failed.", exc_info=error)
            last = self.end(api_error)
        await send_body({"type": "http.response.body", "body": last})
