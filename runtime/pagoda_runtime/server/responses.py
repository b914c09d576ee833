"""/v1/responses: OpenAI's newer form of a chat, which the server remembers for a while."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing
from copy import deepcopy
from functools import partial
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette import responses
from starlette.requests import Request
from starlette.routing import Route

from pagoda_runtime.errors import PagodaError, RequestError
from pagoda_runtime.parsing.deltas import Delta
from pagoda_runtime.server import responses_answers as answers
from pagoda_runtime.server.answer import Answer, typed_deltas
from pagoda_runtime.server.blocks import Block, Blocks, Change
from pagoda_runtime.server.body import read_body
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.errors import ApiError, json_response, to_api_error
from pagoda_runtime.server.generation import close_all
from pagoda_runtime.server.openai import make_creation
from pagoda_runtime.server.response_store import ResponseStore, Stored
from pagoda_runtime.server.responses_protocol import (
    Message,
    ResponsesRequest,
    add_item,
    to_input,
)
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.unsupported import (
    UNSUPPORTED_IN_RESPONSES,
    verify_fields,
    verify_supported,
)

PATH = "/v1/responses"
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
# The events of a block's text, by the kind of the block.
_TEXT_EVENTS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def make_routes(state: ServerState, store: ResponseStore) -> list[Route]:
    async def show(request: Request) -> responses.Response:
        if request.query_params.get("stream") == "true":
            raise RequestError("stream is not supported here; leave it out.", param="stream")
        return json_response(store.get(request.path_params["response_id"]).response)

    async def delete(request: Request) -> responses.Response:
        stored = store.pop(request.path_params["response_id"])
        return json_response(answers.DeletedResponse(stored.response.id, True))

    async def cancel(request: Request) -> responses.Response:
        stored = store.get(request.path_params["response_id"])
        await stored.cancel()
        return json_response(stored.response)

    one = f"{PATH}/{{response_id}}"
    return [
        make_creation(state, PATH, partial(ResponseForm, state, store)),
        Route(one, show),
        Route(one, delete, methods=["DELETE"]),
        Route(f"{one}/cancel", cancel, methods=["POST"]),
    ]


class ResponseForm:
    """Reads one body of /v1/responses, and writes its answer."""

    body: ResponsesRequest
    messages: list[Message]
    """Of the whole conversation, without instructions."""

    def __init__(self, state: ServerState, store: ResponseStore) -> None:
        self.state = state
        self.store = store
        self.blocks = Blocks()
        self.key = uuid.uuid4().hex
        self.num_events = 0
        self.is_cut_off = False
        self.answer: Answer | None = None

    async def read(self, raw: bytes) -> ChatCompletionRequest:
        self.body = body = await read_body(self.state, ResponsesRequest, raw)
        unknown = verify_fields(body, UNSUPPORTED_IN_RESPONSES)
        body.verify()
        self.state.warn_unknown(unknown)
        self.state.verify_model(body.model)
        before: list[Message] = []
        if body.previous_response_id is not None:
            stored = self.store.get(body.previous_response_id, "previous_response_id")
            # What is added may go into the last message.
            before = [*stored.messages[:-1], deepcopy(stored.messages[-1])]
        self.messages = [*before, *body.to_messages()]
        if not self.messages:
            raise RequestError("input is empty; it must have something to answer.", param="input")
        chat = body.to_chat(self.messages)
        verify_supported(chat)
        return chat

    async def collect(self, answer: Answer) -> answers.Response:
        if not self.body.background:
            try:
                await self._take_all(answer)
            finally:
                await close_all(answer.generations)
            return self._finish(answer)
        admission = ExitStack()
        try:
            admission.enter_context(self.state.admit())
        except PagodaError:
            await close_all(answer.generations)
            raise
        stored = Stored(self._describe(answer, "in_progress"), self.messages)
        stored.task = asyncio.create_task(self._run(answer, stored))
        stored.task.add_done_callback(lambda task: admission.close())
        self.store.put(stored)
        return stored.response

    async def _run(self, answer: Answer, stored: Stored) -> None:
        """An answer for which nobody waits."""
        try:
            await self._take_all(answer)
            stored.response = self._describe(answer, self._status)
            self._add_output(stored.messages)
        except asyncio.CancelledError:
            stored.response = self._describe(answer, "cancelled")
        except Exception as error:
            stored.response = self._describe(answer, "failed", to_api_error(error))
        finally:
            await close_all(answer.generations)

    async def _take_all(self, answer: Answer) -> None:
        async with aclosing(self._parts(answer)) as deltas:
            async for parts in deltas:
                self.blocks.add(parts)

    async def stream(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        self.answer = answer
        begun = self._describe(answer, "in_progress")
        yield self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )
        async with aclosing(self._parts(answer)) as deltas:
            async for parts in deltas:
                # One by one: an event tells of its block as it is then.
                if events := b"".join(map(self._write_change, self.blocks.take(parts))):
                    yield events
        if events := b"".join(map(self._write_change, self.blocks.finish())):
            yield events
        response = self._finish(answer)
        yield self._event(f"response.{response.status}", response=response)

    def end(self, error: ApiError | None) -> bytes:
        if error is None:
            return b""
        details = error.body.error
        fields = {"code": details.code or details.type, "message": details.message}
        event = self._event("error", **fields, param=details.param)
        assert self.answer is not None, "the stream has begun"
        failed = self._describe(self.answer, "failed", error)
        return event + self._event("response.failed", response=failed)

    async def _parts(self, answer: Answer) -> AsyncGenerator[Sequence[Delta], None]:
        async with aclosing(typed_deltas(answer)) as deltas:
            async for delta in deltas:
                yield delta.parts
                # Only what is still open then is cut off.
                self.is_cut_off = delta.finish_reason == "length"

    def _finish(self, answer: Answer) -> answers.Response:
        response = self._describe(answer, self._status)
        if self.body.store is not False:
            self._add_output(self.messages)
            self.store.put(Stored(response, self.messages))
        return response

    @property
    def _status(self) -> answers.ResponseStatus:
        return "incomplete" if self.is_cut_off else "completed"

    def _add_output(self, messages: list[Message]) -> None:
        for block in self.blocks.blocks:
            add_item(messages, to_input(block))

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self.num_events, **fields}
        self.num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(body))

    def _write_change(self, change: Change) -> bytes:
        block, kind = change.block, _TEXT_EVENTS[change.block.kind]
        place = {"item_id": self._id_of(block), "output_index": block.index}
        is_call = block.kind == "call"
        in_part = place if is_call else {**place, "content_index": 0}
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if change.what == "text":
            return self._event(f"{kind}.delta", **in_part, delta=change.text, **logprobs)
        if change.what == "start":
            item = self._item(block, "in_progress", has_content=False)
            added = self._event("response.output_item.added", output_index=block.index, item=item)
            if is_call:
                return added
            return added + self._event("response.content_part.added", **in_part, part=_part(block))
        status: answers.ItemStatus = "incomplete" if self.is_cut_off else "completed"
        done = self._event(
            f"{kind}.done",
            **in_part,
            **{"arguments" if is_call else "text": block.text},
            **logprobs,
        )
        if not is_call:
            done += self._event("response.content_part.done", **in_part, part=_part(block))
        item = self._item(block, status)
        return done + self._event("response.output_item.done", output_index=block.index, item=item)

    def _id_of(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.key}{block.index}"

    def _item(
        self, block: Block, status: answers.ItemStatus, *, has_content: bool = True
    ) -> answers.OutputItem:
        item_id = self._id_of(block)
        match _part(block) if block.kind != "call" else None:
            case answers.OutputText() as part:
                content = [part] if has_content else []
                return answers.OutputMessage(item_id, status, "assistant", content)
            case answers.ReasoningText() as part:
                return answers.OutputReasoning(item_id, status, [], [part] if has_content else [])
        return answers.OutputCall(item_id, status, block.call_id, block.name, block.text)

    def _items(self) -> Iterator[answers.OutputItem]:
        blocks = self.blocks.blocks
        for block in blocks:
            is_last = block is blocks[-1]
            yield self._item(block, "incomplete" if is_last and self.is_cut_off else "completed")

    def _describe(
        self, answer: Answer, status: answers.ResponseStatus, error: ApiError | None = None
    ) -> answers.Response:
        body, params, usage = self.body, answer.params, answer.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        failure = None
        if error is not None:
            failure = answers.ResponseError(error.body.error.code or "server_error", str(error))
        return answers.Response(
            id=f"resp_{self.key}",
            created_at=answer.created,
            status=status,
            model=answer.model,
            output=[] if status == "in_progress" else [*self._items()],
            usage=None
            if status == "in_progress"
            else answers.ResponseUsage(
                usage.prompt_tokens,
                answers.InputTokensDetails(cached, 0),
                usage.completion_tokens,
                answers.OutputTokensDetails(answer.num_reasoning_tokens),
                usage.total_tokens,
            ),
            error=failure,
            incomplete_details=(
                answers.IncompleteDetails("max_output_tokens") if status == "incomplete" else None
            ),
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=_dump(body.reasoning) or {"effort": None, "summary": None},
            store=body.store is not False,
            temperature=params.temperature,
            text=_dump(body.text) or {"format": {"type": "text"}},
            tool_choice=_dump(body.tool_choice) or "auto",
            tools=[_dump(tool) for tool in body.tools or ()],
            top_p=params.top_p,
            truncation="disabled",
            user=body.user,
        )


def _part(block: Block) -> answers.OutputText | answers.ReasoningText:
    if block.kind == "reasoning":
        return answers.ReasoningText(block.text)
    return answers.OutputText(block.text, [], [])


def _dump(value: BaseModel | str | None) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value
