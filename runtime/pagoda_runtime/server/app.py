"""The ASGI application: routes, errors, and the raw ASGI around them."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from pagoda_runtime.config import ServerConfig
from pagoda_runtime.server import (
    health,
    messages,
    openai,
    openapi,
    playground,
    pooling,
    responses,
    tokens,
)
from pagoda_runtime.server.access import LOAD_HEADER, REQUEST_ID_HEADER, Access
from pagoda_runtime.server.errors import make_app
from pagoda_runtime.server.framing import ReadHead
from pagoda_runtime.server.middleware import Authenticate, LimitBody
from pagoda_runtime.server.response_store import ResponseStore
from pagoda_runtime.server.route_table import ROUTES
from pagoda_runtime.server.state import ServerState


def create_app(state: ServerState) -> ASGIApp:
    """The application of one server."""
    routes = [
        *health.make_routes(state),
        *openai.make_routes(state),
        *tokens.make_routes(state),
        *messages.make_routes(state),
        *responses.make_routes(state, ResponseStore()),
        *pooling.make_routes(state),
        *openapi.make_routes(are_keys_asked=state.keys.are_asked, root_path=state.config.root_path),
        *(playground.make_routes() if state.config.playground else ()),
    ]
    app = make_app(routes)
    paths = [route.split(" ")[1] for route in ROUTES]
    inner = _allow_origins(Authenticate(LimitBody(app, state), state.keys), state.config)
    return Access(ReadHead(inner, paths, state.config.root_path), state, paths)


def _allow_origins(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """What pages of other origins may ask; before the key, which a preflight does not carry."""
    if not config.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=config.allowed_origins,
        allow_credentials=config.allow_credentials,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        expose_headers=(REQUEST_ID_HEADER, LOAD_HEADER, "retry-after"),
    )
