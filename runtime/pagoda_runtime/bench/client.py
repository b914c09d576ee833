"""An HTTP/1.1 client on plain asyncio sockets that keeps its connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pagoda_runtime.bench.http1 import (
    Address,
    AnswerParser,
    BrokenAnswer,
    ConnectionLost,
    encode_request,
)
from pagoda_runtime.errors import PagodaError

READ_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class CannotConnect(PagodaError):
    """Nothing answers at the server's address."""


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_used: bool = False
    """Whether it served a request already, so that the server may have closed it meanwhile."""


class Answer:
    """The head of an answer has arrived; `pieces` gives the body as it comes."""

    def __init__(self, client: HttpClient, connection: _Connection, parser: AnswerParser) -> None:
        self._client = client
        self._connection = connection
        self._parser = parser
        self._first_piece = b""

    @property
    def status(self) -> int:
        return self._parser.status

    async def read_head(self) -> None:
        while not self._parser.status:
            self._first_piece = await self._read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Raises ConnectionLost or BrokenAnswer."""
        if self._first_piece:
            yield self._first_piece
        while not self._parser.is_complete:
            yield await self._read()

    async def read_all(self) -> bytes:
        """The whole body. Raises ConnectionLost or BrokenAnswer."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise BrokenAnswer(f"the answer exceeds {MAX_ANSWER_BYTES} bytes")
        return bytes(body)

    def release(self) -> None:
        """Give the connection back; one whose answer was not read to its end is closed."""
        self._client.take_back(self._connection, is_reusable=self._parser.keeps_alive)

    async def _read(self) -> bytes:
        try:
            data = await self._connection.reader.read(READ_BYTES)
        except (ConnectionError, ssl.SSLError) as error:
            raise ConnectionLost(f"the connection broke: {error}") from error
        if not data:
            self._parser.end()
        return self._parser.feed(data)


class HttpClient:
    """Requests to one server; as many connections as there are requests at once."""

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self.address = address
        self._headers = headers
        self._idle: list[_Connection] = []
        self._ssl = ssl.create_default_context() if address.scheme == "https" else None

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
        """Send a request and wait for the answer's head.

        Raises CannotConnect, ConnectionLost or BrokenAnswer.
        """
        data = encode_request(method, path, self.address, self._headers, body)
        answer = await self._send(data)
        try:
            yield answer
        finally:
            answer.release()

    async def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    def take_back(self, connection: _Connection, *, is_reusable: bool) -> None:
        if is_reusable:
            connection.is_used = True
            self._idle.append(connection)
        else:
            connection.writer.close()

    async def _send(self, data: bytes) -> Answer:
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            parser = AnswerParser()
            answer = Answer(self, connection, parser)
            try:
                connection.writer.write(data)
                await answer.read_head()
                return answer
            except ConnectionLost:
                answer.release()
                # An idle connection that the server closed has cost it nothing: try the next.
                if not connection.is_used:
                    raise
            except BaseException:
                answer.release()
                raise

    async def _connect(self) -> _Connection:
        address = self.address
        try:
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=self._ssl, limit=READ_BYTES
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
