"""Raw ASGI around the routes: key and size of bodies.

Every scope is of HTTP: the server is run without websockets and lifespan.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda_runtime.errors import QueueFull
from pagoda_runtime.keys import ApiKeys
from pagoda_runtime.server.body import MAX_HELD_BYTES
from pagoda_runtime.server.errors import ApiError
from pagoda_runtime.server.route_table import is_keyed
from pagoda_runtime.server.state import ServerState


class Authenticate:
    """Asks for one of the keys on the paths that are keyed, if keys are asked for."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, is_keyed: Callable[[str], bool] = is_keyed
    ) -> None:
        self.app = app
        self.is_keyed = is_keyed
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.keys.are_asked or not self.is_keyed(scope["path"]) or self._is_allowed(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "The API key is missing or wrong; send `Authorization: Bearer KEY` with a key of "
            "this server.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.to_response(scope["path"])(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            # As Anthropic's clients send it.
            key = headers.get(b"x-api-key", b"")
        return self.keys.accept(key.strip())


class LimitBody:
    """Answers 413 to a body of more than --max-body-bytes, announced or sent, and 429 where those
    of all open requests together are too much."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state
        self.num_held = 0
        """Bytes of the bodies of open requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if int(announced) > self.state.max_body_bytes:
            error = self._too_large(f"The body has {int(announced)} bytes")
            await error.to_response(scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            self.num_held += size
            if num_bytes > self.state.max_body_bytes:
                raise self._too_large("The body is larger")
            if self.num_held > max(MAX_HELD_BYTES, self.state.max_body_bytes):
                raise QueueFull(
                    f"The bodies of the open requests have {self.num_held} bytes, more than this "
                    "server holds at once. Try again later."
                )
            return message

        try:
            await self.app(scope, receive_limited, send)
        finally:
            self.num_held -= num_bytes

    def _too_large(self, what: str) -> ApiError:
        message = (
            f"{what}; this server takes at most {self.state.max_body_bytes} (--max-body-bytes). "
            "Send less in a request."
        )
        return ApiError(413, message, code="body_too_large")
