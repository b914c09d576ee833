"""The responses that a server remembers: the latest ones, in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pagoda_runtime.errors import RequestError, shown
from pagoda_runtime.server.errors import ApiError
from pagoda_runtime.server.responses_answers import Response

MAX_RESPONSES = 1024
# Of all conversations together, each counted whole: as JSON.
MAX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Stored:
    """A response, and the conversation that ends with it."""

    response: Response
    messages: list[dict[str, Any]]
    task: asyncio.Task[None] | None = None
    """Makes the answer, where nobody waits for it."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = len(msgspec.json.encode(self.messages))

    async def cancel(self) -> None:
        """End an answer in the making. Raises RequestError for one that was asked for otherwise."""
        if self.task is None:
            raise RequestError("Only a response with `background: true` can be cancelled.")
        self.task.cancel()
        await asyncio.wait([self.task])


class ResponseStore:
    """Forgets the oldest where there are too many."""

    def __init__(self) -> None:
        self._stored: dict[str, Stored] = {}
        self._num_bytes = 0

    def put(self, stored: Stored) -> None:
        self._stored[stored.response.id] = stored
        self._num_bytes += stored.num_bytes
        while len(self._stored) > MAX_RESPONSES or self._num_bytes > MAX_BYTES:
            self.pop(next(iter(self._stored)))

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Raises ApiError 404, with the field that names it; RequestError: it has no answer yet."""
        stored = self._stored.get(response_id)
        if stored is None:
            raise ApiError(
                404,
                f"There is no response {shown(response_id)} here: it was never stored, or is "
                f"forgotten. A server remembers its latest {MAX_RESPONSES}.",
                param=param,
                code="response_not_found",
            )
        if param is not None and stored.response.status not in ("completed", "incomplete"):
            raise RequestError(
                f"{param} names a response that is {stored.response.status}.", param=param
            )
        return stored

    def pop(self, response_id: str) -> Stored:
        """Forget it. Raises ApiError 404."""
        stored = self.get(response_id)
        del self._stored[response_id]
        self._num_bytes -= stored.num_bytes
        if stored.task is not None:
            stored.task.cancel()
        return stored
