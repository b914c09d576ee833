"""Forms of HTTP requests that the routes do not know of."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pagoda_runtime.server.errors import ApiError


class ReadTarget:
    """Takes absolute-form targets, as proxies send them, and refuses ambiguous lengths of bodies.

    Source: RFC 9112, sections 3.2.2 and 6.3.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if is_length_ambiguous(scope):
                await _refuse_length().to_response()(scope, receive, send)
                return
            scope["path"] = read_path(scope["path"])
        await self.app(scope, receive, send)


def is_length_ambiguous(scope: Scope) -> bool:
    """Whether another server on the way may see the body's end elsewhere, and the next request."""
    names = [name for name, _ in scope["headers"]]
    return b"transfer-encoding" in names and (
        b"content-length" in names or scope["http_version"] == "1.0"
    )


def read_path(target: str) -> str:
    """The path of a target that may be a whole URL."""
    if not target.lower().startswith(("http://", "https://")):
        return target
    _, slash, rest = target.partition("://")[2].partition("/")
    return slash + rest or "/"


def _refuse_length() -> ApiError:
    return ApiError(
        400,
        "Transfer-Encoding stands beside Content-Length, or in HTTP/1.0; send one length.",
        code="bad_http",
        headers={"connection": "close"},
    )


class AnswerHead:
    """Answers HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)
