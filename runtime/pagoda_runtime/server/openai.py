"""The OpenAI-compatible routes: completions, chat completions, models."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagoda_runtime.client.pooling import verify_generates
from pagoda_runtime.server.answer import collect, stream
from pagoda_runtime.server.answers import ChatCompletion, Completion, Model, ModelList
from pagoda_runtime.server.body import read_body, receive_body
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import json_response
from pagoda_runtime.server.generation import close_all
from pagoda_runtime.server.protocol import (
    CompletionRequest,
    GenerationRequest,
)
from pagoda_runtime.server.start import start
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.streaming import EventStream, while_connected
from pagoda_runtime.server.unsupported import verify_supported

BODIES: dict[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


def make_routes(state: ServerState) -> list[Route]:
    """The routes under /v1."""

    async def list_models(request: Request) -> Response:
        models = [_describe_model(state, name) for name in state.model_names]
        return json_response(ModelList(models))

    async def show_model(request: Request) -> Response:
        model = request.path_params["model"]
        state.verify_model(model)
        return json_response(_describe_model(state, model))

    return [
        *(
            Route(path, partial(create_completion, state, body_class), methods=["POST"])
            for path, body_class in BODIES.items()
        ),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
    ]


async def create_completion(
    state: ServerState, body_class: type[GenerationRequest], request: Request
) -> Response:
    """Answer a request for tokens: in one piece, or as a stream."""
    arrival = time.monotonic()
    raw = await receive_body(request)
    state.loaded()
    # Until the last chunk is sent, the drain waits for this request.
    with ExitStack() as open_request:
        open_request.enter_context(state.admit())
        body = await _read(state, body_class, raw)
        del raw
        async with while_connected(request.receive):
            answer = await start(state, body, arrival)
            if not body.stream:
                return json_response(await collect(answer))
        admission = open_request.pop_all()

    async def close() -> None:
        admission.close()
        await close_all(answer.generations)

    return EventStream(stream(answer), close)


async def complete(
    state: ServerState, body_class: type[GenerationRequest], raw: bytes
) -> ChatCompletion | Completion:
    """The answer to a body that asks for no stream. Raises what `errors.to_api_error` takes."""
    with state.admit():
        body = await _read(state, body_class, raw)
        return await collect(await start(state, body, time.monotonic()))


async def _read(
    state: ServerState, body_class: type[GenerationRequest], raw: bytes
) -> GenerationRequest:
    ready, _ = state.loaded()
    verify_generates(ready)
    body = await read_body(state, body_class, raw)
    state.warn_unknown(verify_supported(body))
    state.verify_model(body.model)
    return body


def _describe_model(state: ServerState, name: str) -> Model:
    ready, _ = state.loaded()
    root = state.config.engine.model
    return Model(name, state.created, "pagoda", root, None, ready.max_model_len)
