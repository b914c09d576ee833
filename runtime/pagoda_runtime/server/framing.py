"""Forms of HTTP requests that the routes do not know of."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from pagoda_runtime.server.errors import ApiError


class ReadHead:
    """Takes forms of a request's head that the routes do not know.

    The target may be a whole URL, as proxies send it, and have a slash behind one of paths. HEAD is
    answered as GET; the server leaves the body out. A body whose length is ambiguous is refused.
    The path may begin with root_path, as proxies send it that take nothing off.
    Source: RFC 9112, sections 3.2.2 and 6.3.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], root_path: str = "") -> None:
        self.app = app
        self.paths = frozenset(paths)
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_length_ambiguous(scope):
            error = ApiError(
                400,
                "Transfer-Encoding stands beside Content-Length, or in HTTP/1.0; send one length.",
                code="bad_http",
                headers={"connection": "close"},
            )
            await error.to_response()(scope, receive, send)
            return
        path = read_path(scope["path"])
        if f"{path}/".startswith(f"{self.root_path}/"):
            path = path.removeprefix(self.root_path) or "/"
        # Here and not by a redirect, which behind a proxy names the wrong scheme or host.
        plain = path.removesuffix("/")
        scope["path"] = plain if plain in self.paths else path
        is_head = scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)


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
