"""The OpenAI-compatible routes: completions, chat completions, models."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagoda_runtime.client.pooling import verify_generates
from pagoda_runtime.ipc.messages import EngineReady
from pagoda_runtime.server.answer import Answer, collect, stream
from pagoda_runtime.server.answers import ChatCompletion, Completion, Model, ModelList
from pagoda_runtime.server.body import read_body, receive_body
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import ApiError, json_response
from pagoda_runtime.server.generation import close_all
from pagoda_runtime.server.protocol import CompletionRequest, GenerationRequest
from pagoda_runtime.server.start import start
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.streaming import DONE, EventStream, while_connected

B = TypeVar("B")

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
            make_creation(
                state, path, partial(Form, partial(read_body, state, body), collect, stream, _end)
            )
            for path, body in BODIES.items()
        ),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
    ]


def make_creation(state: ServerState, path: str, make_form: Callable[[], Form]) -> Route:
    """The route that answers requests for tokens in a form."""
    return Route(path, partial(create_completion, state, make_form), methods=["POST"])


def make_answer(
    state: ServerState,
    path: str,
    read: Callable[[bytes], Awaitable[B]],
    handler: Callable[[B, float], Awaitable[object]],
    verify: Callable[[EngineReady], object] = lambda ready: None,
) -> Route:
    """The route whose answer is one value.

    Args:
        handler: makes it of what was read, which came at time.monotonic().
        verify: raises what `errors.to_api_error` takes, whatever the body is.
    """

    async def answer(request: Request) -> Response:
        arrival = time.monotonic()
        raw = await receive_body(request)
        verify(state.loaded()[0])
        with state.admit():
            body = await read(raw)
            async with while_connected(request.receive):
                return json_response(await handler(body, arrival))

    return Route(path, answer, methods=["POST"])


@dataclass(frozen=True, slots=True)
class Form:
    """How a route reads a body and writes its answer."""

    read: Callable[[bytes], Awaitable[GenerationRequest]]
    """The request that the body is. Raises what `errors.to_api_error` takes."""
    collect: Callable[[Answer], Awaitable[object]]
    """The body of the answer in one piece."""
    stream: Callable[[Answer], AsyncGenerator[bytes, None]]
    """The events of the answer."""
    end: Callable[[ApiError | None], bytes]
    """What ends a stream, also one that fails."""


def _end(error: ApiError | None) -> bytes:
    """[DONE], behind the error if there is one."""
    return DONE if error is None else b"data: " + error.encode() + b"\n\n" + DONE


async def create_completion(
    state: ServerState, make_form: Callable[[], Form], request: Request
) -> Response:
    """Answer a request for tokens: in one piece, or as a stream."""
    arrival, form = time.monotonic(), make_form()
    raw = await receive_body(request)
    verify_generates(state.loaded()[0])
    # Until the last chunk is sent, the drain waits for this request.
    with ExitStack() as open_request:
        open_request.enter_context(state.admit())
        body = await form.read(raw)
        del raw
        async with while_connected(request.receive):
            answer = await start(state, body, arrival)
            if not body.stream:
                return json_response(await form.collect(answer))
        admission = open_request.pop_all()

    async def close() -> None:
        admission.close()
        await close_all(answer.generations)

    return EventStream(form.stream(answer), form.end, close)


async def complete(
    state: ServerState, body_class: type[GenerationRequest], raw: bytes
) -> ChatCompletion | Completion:
    """The answer to a body that asks for no stream. Raises what `errors.to_api_error` takes."""
    verify_generates(state.loaded()[0])
    with state.admit():
        body = await read_body(state, body_class, raw)
        return await collect(await start(state, body, time.monotonic()))


def _describe_model(state: ServerState, name: str) -> Model:
    ready, _ = state.loaded()
    root = state.config.engine.model
    return Model(name, state.created, "pagoda", root, None, ready.max_model_len)
