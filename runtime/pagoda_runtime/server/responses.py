"""/v1/responses: OpenAI's newer form of a chat, which the server remembers for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from copy import deepcopy
from functools import partial

from starlette import responses
from starlette.requests import Request
from starlette.routing import Route

from pagoda_runtime.errors import PagodaError, RequestError
from pagoda_runtime.server.answer import Answer
from pagoda_runtime.server.body import read_body
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import ApiError, json_response, to_api_error
from pagoda_runtime.server.generation import close_all
from pagoda_runtime.server.openai import Form, make_creation
from pagoda_runtime.server.response_store import ResponseStore, Stored
from pagoda_runtime.server.responses_answers import DeletedResponse
from pagoda_runtime.server.responses_answers import Response as ResponseAnswer
from pagoda_runtime.server.responses_protocol import Message, ResponsesRequest, add_item, to_input
from pagoda_runtime.server.responses_writing import ResponseWriter
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.unsupported import verify_supported

PATH = "/v1/responses"


def make_routes(state: ServerState, store: ResponseStore) -> list[Route]:
    async def show(request: Request) -> responses.Response:
        if request.query_params.get("stream") == "true":
            raise RequestError("stream is not supported here; leave it out.", param="stream")
        return json_response(store.get(request.path_params["response_id"]).response)

    async def delete(request: Request) -> responses.Response:
        stored = store.pop(request.path_params["response_id"])
        return json_response(DeletedResponse(stored.response.id, True))

    async def cancel(request: Request) -> responses.Response:
        stored = store.get(request.path_params["response_id"])
        await stored.cancel()
        return json_response(stored.response)

    def make_form() -> Form:
        form = ResponseForm(state, store)
        return Form(form.read, form.collect, form.stream, form.end)

    one = f"{PATH}/{{response_id}}"
    return [
        make_creation(state, PATH, make_form),
        Route(one, show),
        Route(one, delete, methods=["DELETE"]),
        Route(f"{one}/cancel", cancel, methods=["POST"]),
    ]


class ResponseForm:
    """Reads one body of /v1/responses, and writes its answer."""

    body: ResponsesRequest
    messages: list[Message]
    """Of the whole conversation, without instructions."""
    writer: ResponseWriter

    def __init__(self, state: ServerState, store: ResponseStore) -> None:
        self.state = state
        self.store = store

    async def read(self, raw: bytes) -> ChatCompletionRequest:
        self.body = body = await read_body(self.state, ResponsesRequest, raw)
        body.verify()
        before: list[Message] = []
        num_bytes = len(raw)
        if body.previous_response_id is not None:
            stored = self.store.get(body.previous_response_id, "previous_response_id")
            num_bytes += stored.num_bytes
            # What is added may go into the last message.
            before = [*stored.messages[:-1], deepcopy(stored.messages[-1])]
        self.messages = [*before, *body.to_messages()]
        if not self.messages:
            raise RequestError("input is empty; it must have something to answer.", param="input")
        chat = await self.state.parse(num_bytes, partial(body.to_chat, self.messages))
        verify_supported(chat)
        return chat

    async def collect(self, answer: Answer) -> ResponseAnswer:
        writer = self.writer = ResponseWriter(self.body, answer)
        if not self.body.background:
            await writer.blocks.collect(answer)
            return self._finish()
        admission = ExitStack()
        try:
            admission.enter_context(self.state.admit())
        except PagodaError:
            await close_all(answer.generations)
            raise
        stored = Stored(writer.describe("in_progress"), self.messages)
        stored.task = asyncio.create_task(self._run(stored))
        stored.task.add_done_callback(lambda task: admission.close())
        self.store.put(stored)
        return stored.response

    async def _run(self, stored: Stored) -> None:
        """An answer for which nobody waits."""
        writer = self.writer
        try:
            await writer.blocks.collect(writer.answer)
            stored.response = writer.describe()
            self._add_output()
        except asyncio.CancelledError:
            stored.response = writer.describe("cancelled")
        except Exception as error:
            stored.response = writer.describe("failed", to_api_error(error))

    async def stream(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        writer = self.writer = ResponseWriter(self.body, answer)
        begun = writer.describe("in_progress")
        yield writer.write_event("response.created", response=begun)
        yield writer.write_event("response.in_progress", response=begun)
        async with aclosing(writer.blocks.stream(answer, writer.write_change)) as events:
            async for event in events:
                yield event
        response = self._finish()
        yield writer.write_event(f"response.{response.status}", response=response)

    def end(self, error: ApiError | None) -> bytes:
        return b"" if error is None else self.writer.write_error(error)

    def _finish(self) -> ResponseAnswer:
        response = self.writer.describe()
        if self.body.store is not False:
            self._add_output()
            self.store.put(Stored(response, self.messages))
        return response

    def _add_output(self) -> None:
        for block in self.writer.blocks.blocks:
            add_item(self.messages, to_input(block))
