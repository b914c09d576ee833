"""Connections of strangers: deadlines for what a client has to do, and a bound on their number.

A connection waits for its client until a request is there whole, while the client does not read its
answer, and between requests. Each of these has its time. Where there is no room for a new one, the
one that waits longest gives way: so a probe gets in, whatever others hold open.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagoda_runtime.server.errors import ApiError

# What a client may take. Keep-alive is longer than the idle time of common load balancers, so that
# they close first and not in a race.
HEADERS, BODY, ANSWER, IDLE = "the headers", "the body", "the answer", "a request"
SECONDS = {HEADERS: 20.0, BODY: 60.0, ANSWER: 120.0, IDLE: 75.0}
# A client that sends or takes so many bytes in that time has as much again: a slow line, or a
# reader who works on each token.
LEAST_BYTES = {BODY: 1 << 20, ANSWER: 4096}

# Connections beside those of requests for tokens: probes, scrapers, short answers.
PROBE_ROOM = 32
# For the engine's sockets, the model's files, and what libraries open.
RESERVED_FILES = 128
LEAST_CONNECTIONS = 1024
# On average, of the chunks of a body after so many.
LEAST_CHUNK_BYTES = 64
FREE_CHUNKS = 4096
LARGEST_BACKLOG = 2048
LARGEST_FILE_LIMIT = 65536


def raise_file_limit() -> int:
    """The number of files that this process may open, raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LARGEST_FILE_LIMIT if hard == resource.RLIM_INFINITY else min(hard, LARGEST_FILE_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return LARGEST_FILE_LIMIT if soft == resource.RLIM_INFINITY else soft


def share_files(num_files: int, num_requests: int) -> tuple[int, int]:
    """(connections at once, backlog) for so many files.

    A loop that was busy takes the whole backlog at once, so that needs files, too. Besides requests
    there is room for as many connections that are kept alive, and for a burst that is refused.
    """
    free = max(4 * PROBE_ROOM, num_files - RESERVED_FILES)
    backlog = min(LARGEST_BACKLOG, free // 2)
    wanted = max(LEAST_CONNECTIONS, 2 * num_requests + PROBE_ROOM)
    return min(wanted, free - backlog), backlog


@dataclass(slots=True)
class Room:
    """The places of one server's connections."""

    limit: int
    """Connections at once."""
    waiting: dict[Connection, None] = field(default_factory=dict)
    """Those that wait for their client, the longest first."""


class Framing(h11.Connection):
    """h11's connection that takes no body in very many tiny chunks: each costs as much as 64 kB."""

    num_chunks = num_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_chunks += 1
            self.num_bytes += len(event.data)
            least_bytes = LEAST_CHUNK_BYTES * (self.num_chunks - FREE_CHUNKS)
            if self.num_bytes < least_bytes:
                raise h11.RemoteProtocolError("The chunks of the body are too small.")
        return event


class Connection(H11Protocol):
    """uvicorn's connection with deadlines, in a room; errors of HTTP in the shape of all others."""

    conn: Framing

    def __init__(self, *args: Any, room: Room, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Framing(h11.SERVER)
        self.room = room
        self.awaited: str | None = None
        """What the client has to do next; None while it is the server's turn."""
        self._deadline: asyncio.TimerHandle | None = None
        self._moved_before = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        while len(self.connections) > self.room.limit:
            next(iter(self.room.waiting), self).give_way()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._await(None)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "This is no HTTP request that can be read.", code="bad_http"))

    def give_way(self) -> None:
        """Close at once, for another connection."""
        self._await(None)
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        state = self.conn.their_state
        if state is h11.SEND_BODY and not self.transport.is_closing():
            self._await(BODY)
        elif self.flow.write_paused or self.transport.is_closing():
            # What was written last may be on its way still.
            self._await(ANSWER)
        elif state is h11.IDLE:
            has_begun = self.cycle is None or self.conn.trailing_data[0]
            self._await(HEADERS if has_begun else IDLE)
        else:
            self._await(None)

    def _await(self, awaited: str | None) -> None:
        """Wait for this from now on, or still, if it was awaited before."""
        if awaited == self.awaited:
            return
        # A body belongs to the request whose headers were waited for.
        if not (awaited == BODY and self.awaited == HEADERS):
            self.room.waiting.pop(self, None)
        self.awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if awaited is not None:
            self.room.waiting.setdefault(self)
            self._moved_before = self._count_moved()
            self._deadline = self.loop.call_later(SECONDS[awaited], self._expire)

    def _count_moved(self) -> int:
        """Bytes that the client sent or took, from whatever point they are counted."""
        if self.awaited == ANSWER:
            return -self.transport.get_write_buffer_size()
        # Behind its answer nobody needs the rest of a body.
        return 0 if self.conn.our_state is h11.DONE else self.conn.num_bytes

    def _expire(self) -> None:
        awaited = self.awaited
        least_bytes = LEAST_BYTES.get(awaited or "", inf)
        if self._count_moved() - self._moved_before >= least_bytes:
            self._await(None)
            self._await(awaited)
        elif awaited == BODY or (awaited == HEADERS and self.conn.trailing_data[0]):
            late = f"{awaited} did not come within {SECONDS[awaited]:g} s; send the request again."
            self._refuse(ApiError(408, late[0].upper() + late[1:], code="request_timeout"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = error.encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        phrase = HTTPStatus(error.status).phrase.encode()
        head = h11.Response(status_code=error.status, headers=headers, reason=phrase)
        is_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        for event in (head, h11.Data(data=b"" if is_head else body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
        if self.cycle is not None:
            # The route that reads the body hears that the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
