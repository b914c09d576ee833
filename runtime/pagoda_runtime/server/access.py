"""The outermost layer of a server: ids of requests, and a line in the log for each."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda_runtime.logs import request_id

logger = logging.getLogger("pagoda.access")

REQUEST_ID_HEADER = "x-request-id"
# Where a stream finds the server's own `send`: its chunks need nothing of what stands between.
RAW_SEND = "pagoda.send"
# What may stand in a log line and a header as it is.
_VALID_ID = re.compile(rb"[!-~]{1,128}")
MAX_LOGGED_TARGET_BYTES = 500
# Probes and scrapers ask for these every few seconds.
PROBES = frozenset({"/startup", "/health", "/ready", "/load", "/metrics"})


class Access:
    """Gives a request its id, for the answer and for every log line about it, and logs its end.

    The id is that of the header X-Request-Id if it is 1 to 128 visible ASCII characters, else a
    new one. Probes are logged at the level debug.
    """

    def __init__(self, app: ASGIApp, *, is_logged: bool) -> None:
        self.app = app
        self.is_logged = is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500
        name = read_request_id(scope)
        scope[RAW_SEND] = send

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (REQUEST_ID_HEADER.encode(), name.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        # It stays set, for what the server logs of an exception that leaves here; each request is
        # answered in a task, and so in a context, of its own.
        request_id.set(name)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if self.is_logged:
                _log(scope, status, time.perf_counter() - started)


def read_request_id(scope: Scope) -> str:
    """The id that the client gave, if it may stand in a log, else a new one."""
    given: bytes = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"")
    return given.decode() if _VALID_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, status: int, elapsed_seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
    if not logger.isEnabledFor(level):
        return
    # As it was sent, with no byte that could begin a line of its own.
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    text = target[:MAX_LOGGED_TARGET_BYTES].decode("latin-1")
    shown = text.encode("unicode_escape").decode()
    host, port = scope.get("client") or ("-", 0)
    logger.log(
        level, "%s:%d %s %s %d %.3f s", host, port, scope["method"], shown, status, elapsed_seconds
    )
