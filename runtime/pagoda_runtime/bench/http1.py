"""HTTP/1.1 answers and server-sent events, read as they arrive.

Small on purpose: a benchmark that shares the cores with the server must not cost much itself
(docs/decisions/0001).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from pagoda_runtime.errors import PagodaError, RequestError

# The limit of the StreamReader that an answer is read from.
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024


class NoAnswer(PagodaError):
    """A request had no whole answer; reports count it as its `kind`."""

    kind: str


class CannotConnect(NoAnswer):
    """Nothing answers at the server's address."""

    kind = "cannot connect"


class ConnectionLost(NoAnswer):
    """The server closed the connection before its answer was whole."""

    kind = "connection lost"


class BrokenAnswer(NoAnswer):
    """What the server sent is no HTTP/1.1 answer."""

    kind = "broken answer"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a base URL points to."""

    scheme: str
    host: str
    port: int
    prefix: str
    """Path of the base URL, without a slash at its end."""

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_base_url(url: str) -> Address:
    """The address of a base URL such as http://localhost:8000. Raises RequestError."""
    remedy = "give --base-url the server's address, as http://localhost:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError(f"--base-url {url!r} is not a URL: {error}; {remedy}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"--base-url {url!r} is not an http or https URL; {remedy}.")
    # Users of OpenAI clients write the /v1 that every path here has already.
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        prefix=prefix,
    )


def encode_request(
    method: str, path: str, address: Address, headers: dict[str, str], body: bytes
) -> bytes:
    """The bytes of a request."""
    fields = {
        "Host": address.host_header,
        "Content-Length": str(len(body)),
        "Content-Type": "application/json",
        "Accept": "*/*",
        **headers,
    }
    lines = [f"{method} {address.prefix}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Answer:
    """One answer, read from its connection as it arrives."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case."""
        self._is_complete = False
        # Bytes of the body; None: until the connection ends.
        self._length: int | None = None
        self._is_chunked = False

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection serves another request after this answer."""
        closes = self.headers.get("connection", "").lower() == "close"
        has_end = self._is_chunked or self._length is not None
        return self._is_complete and has_end and not closes

    async def read_head(self) -> None:
        """Wait for status and headers. Raises ConnectionLost or BrokenAnswer."""
        # 100 Continue and its like precede the answer.
        while self.status < 200:
            with _as_our_errors():
                head = await self._reader.readuntil(b"\r\n\r\n")
            self._take_head(head.decode("latin-1"))

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionLost or BrokenAnswer."""
        reader, num_missing = self._reader, self._length
        with _as_our_errors():
            if self._is_chunked:
                while chunk := await self._read_chunk():
                    yield chunk
            elif num_missing is None:
                while piece := await reader.read(MAX_HEAD_BYTES):
                    yield piece
            while num_missing:
                piece = await reader.read(min(num_missing, MAX_HEAD_BYTES))
                if not piece:
                    raise asyncio.IncompleteReadError(piece, num_missing)
                num_missing -= len(piece)
                yield piece
        self._is_complete = True

    async def read_all(self) -> bytes:
        """The whole body. Raises ConnectionLost or BrokenAnswer."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise BrokenAnswer(f"the answer exceeds {MAX_BODY_BYTES} bytes")
        return bytes(body)

    def _take_head(self, head: str) -> None:
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        version, _, tail = first.partition(" ")
        status = tail[:3]
        if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdigit()):
            raise BrokenAnswer(f"the answer begins with {first[:80]!r} and not with HTTP/1.1")
        self.status = int(status)
        self.headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._is_chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length", "")
        if length and not (length.isascii() and length.isdigit()):
            raise BrokenAnswer(f"the answer's Content-Length is {length!r}")
        if self._is_chunked:
            self._length = None
        elif self.status in (204, 304):
            self._length = 0
        else:
            self._length = int(length) if length else None

    async def _read_chunk(self) -> bytes:
        """Size in hex, a line's end, the bytes, a line's end; nothing is the last chunk."""
        line = await self._reader.readuntil(b"\r\n")
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            size = -1
        if not 0 <= size <= MAX_BODY_BYTES:
            raise BrokenAnswer(f"the size of a chunk is {line[:20].strip()!r}")
        if size:
            return (await self._reader.readexactly(size + 2))[:-2]
        # Trailers may follow the last chunk; an empty line ends them.
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return b""


@contextlib.contextmanager
def _as_our_errors() -> Iterator[None]:
    try:
        yield
    except asyncio.IncompleteReadError as error:
        message = "the server closed the connection in the middle of its answer"
        raise ConnectionLost(message) from error
    except asyncio.LimitOverrunError as error:
        raise BrokenAnswer(f"the answer's head exceeds {MAX_HEAD_BYTES} bytes") from error
    except (ConnectionError, ssl.SSLError) as error:
        raise ConnectionLost(f"the connection broke: {error}") from error


class EventParser:
    """Server-sent events; OpenAI's servers write each as one line of data."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
