"""An HTTP/1.1 client on asyncio's streams that keeps its connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pagoda_runtime.bench.http1 import (
    MAX_HEAD_BYTES,
    Address,
    Answer,
    CannotConnect,
    ConnectionLost,
    encode_request,
)


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_used: bool = False
    """Whether it served a request already, so that the server may have closed it meanwhile."""


class HttpClient:
    """Requests to one server; as many connections as there are requests at once."""

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self._address = address
        self._headers = headers
        self._idle: list[_Connection] = []
        self._ssl = ssl.create_default_context() if address.scheme == "https" else None

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
        """Send a request and wait for the answer's head.

        Raises NoAnswer.
        """
        data = encode_request(method, path, self._address, self._headers, body)
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            answer = Answer(connection.reader)
            try:
                try:
                    connection.writer.write(data)
                    await answer.read_head()
                except ConnectionLost:
                    # An idle connection that the server closed has cost it nothing: try the next.
                    if connection.is_used:
                        continue
                    raise
                yield answer
                return
            finally:
                # One whose answer was not read to its end is closed.
                if answer.keeps_alive:
                    connection.is_used = True
                    self._idle.append(connection)
                else:
                    connection.writer.close()

    async def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        address = self._address
        try:
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=self._ssl, limit=MAX_HEAD_BYTES
            )
        except (OSError, ssl.SSLError) as error:
            raise CannotConnect(
                f"cannot connect to {address.host_header}: {_describe(error)}"
            ) from error
        return _Connection(reader, writer)


def _describe(error: OSError) -> str:
    """Without the addresses that asyncio puts into its own text."""
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return "connection refused"
    return error.strerror or str(error)
