"""The outermost layer of a server: ids of requests, the load, metrics, and a line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda_runtime.logs import request_id
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.tracing import TRACE_HEADERS, trace_headers

logger = logging.getLogger("pagoda.access")

REQUEST_ID_HEADER, LOAD_HEADER = "x-request-id", "x-pagoda-load"
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
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

    Args:
        paths: told apart in metrics, where all others are one. Where there are any, each answer
            tells the load, and closes its connection while the server drains.
    """

    def __init__(self, app: ASGIApp, state: ServerState, paths: Collection[str] = ()) -> None:
        self.app, self.state, self.paths = app, state, frozenset(paths)
        # The longer one says more.
        templates = sorted((path for path in self.paths if "{" in path), key=len, reverse=True)
        self.templates = {path: re.compile(re.sub(r"{\w+}", ".+", path)) for path in templates}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500
        name = read_request_id(scope)
        scope[RAW_SEND] = send

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = name
                if self.paths:
                    self._tell_load(headers)
            await send(message)

        # It stays set, for what the server logs of an exception that leaves here; each request is
        # answered in a task, and so in a context, of its own.
        request_id.set(name)
        if self.state.tracer is not None:
            headers = Headers(scope=scope)
            trace_headers.set({key: headers[key] for key in TRACE_HEADERS if key in headers})
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            elapsed = time.perf_counter() - started
            if self.paths:
                self._count(scope, status, elapsed)
            if not self.state.config.disable_access_log:
                _log(scope, status, elapsed)

    def _tell_load(self, headers: MutableHeaders) -> None:
        headers[LOAD_HEADER] = msgspec.json.encode(self.state.load()).decode()
        if self.state.is_draining:
            headers["connection"] = "close"

    def _count(self, scope: Scope, status: int, elapsed_seconds: float) -> None:
        # Labels come from fixed sets: a client must not be able to make new series.
        method, path = scope["method"], scope["path"]
        if path not in self.paths:
            fitting = (name for name, form in self.templates.items() if form.fullmatch(path))
            path = next(fitting, OTHER)
        method = method if method in KNOWN_METHODS else OTHER
        self.state.metrics.observe_http(method, status, path, elapsed_seconds)


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
