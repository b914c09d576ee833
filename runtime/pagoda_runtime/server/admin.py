"""The admin port: what changes the server for everybody, for its owner alone.

It has an address of its own, so that no Service or ingress in front of the server leads here.
"""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pagoda_runtime.server.access import Access
from pagoda_runtime.server.errors import json_response, make_app
from pagoda_runtime.server.framing import ReadHead
from pagoda_runtime.server.middleware import Authenticate
from pagoda_runtime.server.state import ServerState

logger = logging.getLogger("pagoda.server")

RESET = "/reset_prefix_cache"


def create_admin_app(state: ServerState) -> ASGIApp:
    """The application of the admin port; every path asks for an API key, if there are keys."""

    async def reset_prefix_cache(request: Request) -> Response:
        state.loaded()
        num_blocks = await state.engine.reset_prefix_cache()
        logger.info("The prefix cache was emptied: %d blocks.", num_blocks)
        return json_response({"num_blocks": num_blocks})

    app = make_app([Route(RESET, reset_prefix_cache, methods=["POST"])])
    inner = ReadHead(Authenticate(app, state.keys, lambda path: True), [RESET])
    return Access(inner, state)
