"""HTTP/1.1 answers and server-sent events, read from bytes as they arrive. No sockets here.

Small on purpose: a benchmark that shares the cores with the server must not cost much itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from pagoda_runtime.errors import PagodaError, RequestError

MAX_HEAD_BYTES = 64 * 1024


class BrokenAnswer(PagodaError):
    """What the server sent is no HTTP/1.1 answer."""


class ConnectionLost(PagodaError):
    """The server closed the connection before its answer was whole."""


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


class AnswerParser:
    """One answer; `feed` takes bytes from the socket and gives back those of the body."""

    def __init__(self) -> None:
        self.status = 0
        """0 until the head is complete."""
        self.headers: dict[str, str] = {}
        """Names in lower case."""
        self.is_complete = False
        self._buffer = b""
        # Bytes of the body, or of the current chunk, that are still to come; None: until the end.
        self._num_missing: int | None = 0
        self._is_chunked = False

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection serves another request after this answer."""
        closes = self.headers.get("connection", "").lower() == "close"
        return self.is_complete and not closes and self._num_missing is not None

    def feed(self, data: bytes) -> bytes:
        """Raises BrokenAnswer."""
        self._buffer += data
        if not self.status and not self._read_head():
            return b""
        if self._is_chunked:
            return self._read_chunks()
        if self._num_missing is None:
            body, self._buffer = self._buffer, b""
            return body
        body, self._buffer = self._buffer[: self._num_missing], self._buffer[self._num_missing :]
        self._num_missing -= len(body)
        self.is_complete = self._num_missing == 0
        return body

    def end(self) -> None:
        """The connection was closed. Raises ConnectionLost if the answer is not whole."""
        if self.status and self._num_missing is None:
            self.is_complete = True
        if not self.is_complete:
            raise ConnectionLost("the server closed the connection in the middle of its answer")

    def _read_head(self) -> bool:
        while not self.status:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise BrokenAnswer(f"the answer's head exceeds {MAX_HEAD_BYTES} bytes")
                return False
            self._buffer = rest
            self._take_head(head.decode("latin-1"))
        return True

    def _take_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        version, _, tail = first.partition(" ")
        status = tail[:3]
        if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdigit()):
            raise BrokenAnswer(f"the answer begins with {first[:80]!r} and not with HTTP/1.1")
        if status.startswith("1"):
            # 100 Continue and its like precede the answer.
            return
        self.status = int(status)
        self.headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._take_length()

    def _take_length(self) -> None:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._is_chunked = True
        elif self.status in (204, 304):
            self.is_complete = True
        elif (length := self.headers.get("content-length")) is None:
            self._num_missing = None
        elif not (length.isascii() and length.isdigit()):
            raise BrokenAnswer(f"the answer's Content-Length is {length!r}")
        else:
            self._num_missing = int(length)

    def _read_chunks(self) -> bytes:
        """A chunk is its size in hex, a line's end, the bytes, a line's end; size 0 is the last."""
        body = []
        while not self.is_complete:
            if self._num_missing:
                piece = self._buffer[: self._num_missing]
                self._buffer = self._buffer[len(piece) :]
                self._num_missing -= len(piece)
                body.append(piece)
                if self._num_missing:
                    break
            # The line's end of the chunk before, if there was one, precedes the size.
            start = 2 if self._buffer.startswith(b"\r\n") else 0
            end = self._buffer.find(b"\r\n", start)
            if end < 0:
                break
            line = self._buffer[start:end].split(b";")[0].strip()
            try:
                self._num_missing = int(line, 16)
            except ValueError:
                raise BrokenAnswer(f"the size of a chunk is {line[:20]!r}") from None
            if self._num_missing:
                self._buffer = self._buffer[end + 2 :]
                continue
            # Trailers may follow the last chunk; an empty line ends them.
            if b"\r\n\r\n" not in self._buffer[end:]:
                break
            self._buffer = b""
            self.is_complete = True
        return b"".join(body)


class EventParser:
    """Server-sent events; OpenAI's servers write each as one line of data."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
