"""The OpenAI-compatible routes: completions, chat completions, models."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pagoda_runtime.errors import ModelNotServed, RequestError
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.errors import describe_validation
from pagoda_runtime.server.generation import (
    Choice,
    TextDelta,
    close_choices,
    merge,
    start_choices,
)
from pagoda_runtime.server.prompts import encode_chat, encode_prompts, resolve_max_tokens
from pagoda_runtime.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    verify_supported,
)
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.streaming import (
    ChunkWriter,
    ClientDisconnected,
    EventStream,
    run_while_connected,
)

Body = TypeVar("Body", bound=GenerationRequest)

logger = logging.getLogger("pagoda.server")

# OpenAI's default for completions; a chat may use the rest of the context.
DEFAULT_COMPLETION_TOKENS = 16
CLIENT_CLOSED_REQUEST = 499


def make_router(state: ServerState) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1")

    async def complete(request: Request) -> Response:
        return await _answer(state, request, CompletionRequest)

    async def chat(request: Request) -> Response:
        return await _answer(state, request, ChatCompletionRequest)

    async def list_models() -> Response:
        models = [_describe_model(state, name) for name in state.model_names]
        return _json({"object": "list", "data": models})

    async def show_model(model: str) -> Response:
        _verify_model(state, model)
        return _json(_describe_model(state, model))

    router.add_api_route("/completions", complete, methods=["POST"])
    router.add_api_route("/chat/completions", chat, methods=["POST"])
    router.add_api_route("/models", list_models, methods=["GET"])
    router.add_api_route("/models/{model:path}", show_model, methods=["GET"])
    return router


@dataclass(slots=True)
class Answer:
    """One answer in the making: its identity, its choices and what was counted so far."""

    request: GenerationRequest
    id: str
    model: str
    created: int
    choices: list[Choice]
    num_prompt_tokens: list[int]
    num_tokens: list[int] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_tokens = [0] * len(self.choices)
        self.num_cached_tokens = [0] * len(self.choices)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatCompletionRequest)

    def count(self, delta: TextDelta) -> None:
        self.num_tokens[delta.index] += delta.num_tokens
        self.num_cached_tokens[delta.index] = delta.num_cached_tokens

    def usage(self) -> dict[str, Any]:
        """Tokens so far, over all choices."""
        prompt, completion = sum(self.num_prompt_tokens), sum(self.num_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens)},
        }


async def _answer(state: ServerState, request: Request, body_class: type[Body]) -> Response:
    arrival = time.monotonic()
    try:
        raw = await request.body()
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    state.loaded()
    # Until the last chunk is sent, the drain waits for this request.
    with ExitStack() as stack:
        stack.enter_context(state.admit())
        body = _parse(state, raw, body_class)
        try:
            answer = await run_while_connected(request.receive, _start(state, body, arrival))
            if body.stream:
                admission = stack.pop_all()

                async def close() -> None:
                    admission.close()
                    await close_choices(answer.choices)

                return EventStream(_stream(answer), close)
            return await run_while_connected(request.receive, _collect(answer))
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)


def _parse(state: ServerState, raw: bytes, body_class: type[Body]) -> Body:
    try:
        body = body_class.model_validate_json(raw)
    except ValidationError as error:
        raise describe_validation(error) from None
    for name in verify_supported(body):
        if state.is_first_warning(name):
            logger.warning("Unknown field in a request, ignored: %.100r", name)
    if body.model is not None:
        _verify_model(state, body.model)
    return body


def _verify_model(state: ServerState, model: str) -> None:
    if model not in state.model_names:
        served = ", ".join(state.model_names)
        raise ModelNotServed(f"There is no model {model!r} here; this server has: {served}.")


async def _start(state: ServerState, body: GenerationRequest, arrival: float) -> Answer:
    """Tokenize and hand over to the engine. Raises RequestError, QueueFull, EngineDead."""
    ready, tokenizer = state.loaded()
    is_chat = isinstance(body, ChatCompletionRequest)
    num_prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
    engine_config = state.config.engine
    most = engine_config.max_num_seqs + engine_config.max_num_waiting
    if num_prompts > most:
        raise RequestError(
            f"The request has {num_prompts} prompts; this server takes at most {most} at once.",
            param="prompt",
        )
    with state.tokenizing(num_prompts):
        if isinstance(body, ChatCompletionRequest):
            prompts = [await encode_chat(state, tokenizer, body)]
            max_tokens, max_tokens_name = body.max_completion_tokens, "max_completion_tokens"
            if max_tokens is None:
                max_tokens, max_tokens_name = body.max_tokens, "max_tokens"
            default = None
        else:
            assert isinstance(body, CompletionRequest)
            prompts = await encode_prompts(state, tokenizer, body.prompt)
            max_tokens, max_tokens_name = body.max_tokens, "max_tokens"
            default = DEFAULT_COMPLETION_TOKENS
    params: list[SamplingParams] = []
    for prompt in prompts:
        limit = resolve_max_tokens(
            max_tokens, default, len(prompt), ready.max_model_len, param=max_tokens_name
        )
        params.append(body.to_sampling_params(limit, ready.default_sampling))
    answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    choices = await start_choices(state, tokenizer, answer_id, prompts, params, arrival)
    return Answer(
        request=body,
        id=answer_id,
        model=body.model or state.model_names[0],
        created=int(time.time()),
        choices=choices,
        num_prompt_tokens=[len(prompt) for prompt in prompts],
    )


async def _stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    request = answer.request
    kind = "chat.completion.chunk" if answer.is_chat else "text_completion"
    writer = ChunkWriter(kind, answer.id, answer.model, answer.created, request.includes_usage)
    if answer.is_chat:
        yield writer.write_role(0)
    async with aclosing(merge(answer.choices)) as deltas:
        async for delta in deltas:
            answer.count(delta)
            usage = answer.usage() if request.has_continuous_usage else None
            if delta.text or delta.finish_reason is not None or usage is not None:
                yield writer.write_text(
                    delta.index, delta.text, delta.finish_reason, delta.stop_reason, usage
                )
    if request.includes_usage:
        yield writer.write_usage(answer.usage())


async def _collect(answer: Answer) -> Response:
    texts = [""] * len(answer.choices)
    last: list[TextDelta | None] = [None] * len(answer.choices)
    try:
        async with aclosing(merge(answer.choices)) as deltas:
            async for delta in deltas:
                answer.count(delta)
                texts[delta.index] += delta.text
                last[delta.index] = delta
    finally:
        await close_choices(answer.choices)
    choices = [
        _render_choice(answer, text, delta)
        for text, delta in zip(texts, last, strict=True)
        if delta is not None
    ]
    return _json(
        {
            "id": answer.id,
            "object": "chat.completion" if answer.is_chat else "text_completion",
            "created": answer.created,
            "model": answer.model,
            "choices": choices,
            "usage": answer.usage(),
        }
    )


def _render_choice(answer: Answer, text: str, last: TextDelta) -> dict[str, Any]:
    if answer.is_chat:
        content: dict[str, Any] = {
            "message": {"role": "assistant", "content": text, "refusal": None}
        }
    else:
        content = {"text": text}
    return {
        "index": last.index,
        **content,
        "logprobs": None,
        "finish_reason": last.finish_reason,
        "stop_reason": last.stop_reason,
    }


def _describe_model(state: ServerState, name: str) -> dict[str, Any]:
    ready, _ = state.loaded()
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "pagoda",
        "root": state.config.engine.model,
        "parent": None,
        "max_model_len": ready.max_model_len,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
