"""The two streaming endpoints of OpenAI's API, and the measuring of one request to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pagoda_runtime.bench.chunks import ChunkReader, Usage, show_error
from pagoda_runtime.bench.client import HttpClient
from pagoda_runtime.bench.http1 import Answer, BrokenAnswer, NoAnswer
from pagoda_runtime.bench.workloads.base import BenchRequest, render_words


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go and what of the prompt they carry."""

    name: str
    path: str
    make_prompt: Callable[[BenchRequest, bool], dict[str, Any]]
    """(request, whether as text) → the fields that hold the prompt."""
    max_tokens_field: str


def _completion_prompt(request: BenchRequest, as_text: bool) -> dict[str, Any]:
    ids = request.prompt_token_ids
    return {"prompt": render_words(ids) if as_text else ids}


def _chat_prompt(request: BenchRequest, as_text: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": render_words(request.prompt_token_ids)}]}


ENDPOINTS = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint("completions", "/v1/completions", _completion_prompt, "max_tokens"),
        Endpoint("chat", "/v1/chat/completions", _chat_prompt, "max_completion_tokens"),
    )
}


@dataclass(frozen=True, slots=True)
class BodyOptions:
    """What every request of a run says beside its prompt."""

    model: str
    temperature: float
    ignore_eos: bool
    prompt_as_text: bool


def encode_body(endpoint: Endpoint, request: BenchRequest, options: BodyOptions) -> bytes:
    """The JSON body of a streaming request."""
    body = {
        "model": options.model,
        **endpoint.make_prompt(request, options.prompt_as_text),
        endpoint.max_tokens_field: request.output_len,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # Not a field of OpenAI's own: sent only where it asks for something.
    if options.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


@dataclass(slots=True)
class RequestRecord:
    """What one request showed; all times in seconds."""

    started: float
    """time.perf_counter() when it was sent."""
    ended: float = 0.0
    """time.perf_counter() of the last event with a choice, or of the failure."""
    time_to_first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Between one event with text and the next."""
    num_prompt_tokens: int | None = None
    """As the server counts them; None: it does not say."""
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    is_counted_by_server: bool = False
    """False: the output tokens are the events with text, for want of the server's count."""
    failure: str | None = None
    """The kind: HTTP 429, cannot connect, connection lost, timeout, error event, …"""
    detail: str = ""

    @property
    def end_to_end(self) -> float:
        return self.ended - self.started

    @property
    def time_per_output_token(self) -> float | None:
        """Mean over the tokens after the first; None for a single token."""
        if self.time_to_first_token is None or self.num_output_tokens < 2:
            return None
        return (self.end_to_end - self.time_to_first_token) / (self.num_output_tokens - 1)


class Refused(NoAnswer):
    """The server answered with another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.kind = f"HTTP {status}"


async def measure(
    client: HttpClient, path: str, body: bytes, *, timeout_seconds: float
) -> RequestRecord:
    """Send one streaming request and record it; failures are part of the record."""
    record = RequestRecord(started=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_seconds), client.request("POST", path, body) as answer:
            if answer.status != 200:
                raise Refused(answer.status, show_error(await answer.read_all()))
            await _read_stream(answer, record)
    except TimeoutError:
        record.failure, record.detail = "timeout", f"no end after {timeout_seconds:g} s"
    except NoAnswer as error:
        record.failure, record.detail = error.kind, str(error)
    if record.failure is not None:
        record.ended = time.perf_counter()
    return record


async def _read_stream(answer: Answer, record: RequestRecord) -> None:
    chunks, num_texts, last_text = ChunkReader(), 0, 0.0
    async for piece in answer.pieces():
        now = time.perf_counter()
        for chunk in chunks.feed(piece):
            if chunk.usage is not None:
                _take_usage(record, chunk.usage)
            if not chunk.choices:
                continue
            record.ended = now
            if any(choice.has_text for choice in chunk.choices):
                if num_texts == 0:
                    record.time_to_first_token = now - record.started
                else:
                    record.gaps.append(now - last_text)
                num_texts, last_text = num_texts + 1, now
    chunks.finish()
    if not record.ended:
        raise BrokenAnswer("the stream held no choice")
    if record.time_to_first_token is None:
        # Tokens without text, such as special ones: all that is known is when they were complete.
        record.time_to_first_token = record.end_to_end
    if not record.is_counted_by_server:
        record.num_output_tokens = num_texts


def _take_usage(record: RequestRecord, usage: Usage) -> None:
    record.num_prompt_tokens = usage.prompt_tokens
    if usage.prompt_tokens_details is not None:
        record.num_cached_tokens = usage.prompt_tokens_details.cached_tokens or 0
    if usage.completion_tokens is not None:
        record.num_output_tokens = usage.completion_tokens
        record.is_counted_by_server = True
