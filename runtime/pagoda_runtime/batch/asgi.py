"""A request to an ASGI application of this process, without a socket."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message

logger = logging.getLogger("pagoda.batch")


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """POST JSON; returns status and body of the answer. Cancelling it is a client that leaves."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
    }
    is_sent = False
    status = 0
    parts: list[bytes] = []

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            # This client stays until it has its answer.
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # The application answers 500 first, and leaves the logging to its server.
        if not status:
            raise
        logger.exception("A request failed.")
    return status, b"".join(parts)
