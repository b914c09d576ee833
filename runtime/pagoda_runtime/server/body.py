"""The body of a request: how much of it is read, how many objects it may become, and which.

Parsing holds Python's lock, in a thread too: while a body becomes objects, no stream gets a token.
So its shape is measured first, by searches that cost a nanosecond for a byte.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.errors import validate
from pagoda_runtime.server.unsupported import verify_supported

if TYPE_CHECKING:
    from pagoda_runtime.server.state import ServerState

B = TypeVar("B", bound=BaseModel)

# The context as text: 64 bytes for a token are room for JSON's escapes and for several prompts.
BODY_BYTES_PER_TOKEN = 64
LEAST_MAX_BODY_BYTES = 4 * 1024 * 1024
# Of all requests that are open.
MAX_HELD_BYTES = 256 * 1024 * 1024

# An array or object takes up to some microseconds, a string half of one, another value 50 ns.
MAX_CONTAINERS = 8192
MAX_STRINGS = 32_768
LEAST_MAX_VALUES = 262_144


def default_max_body_bytes(max_model_len: int) -> int:
    return LEAST_MAX_BODY_BYTES + BODY_BYTES_PER_TOKEN * max_model_len


async def receive_body(request: Request) -> bytes:
    """All of it, kept by nobody else. Raises starlette's ClientDisconnect."""
    return b"".join([chunk async for chunk in request.stream()])


async def read_body(state: ServerState, body_class: type[B], raw: bytes) -> B:
    """The body as its model, of which all that it asks for is served, as far as fields tell.

    Raises ApiError, RequestError or ModelNotServed, or as `state.loaded`.
    """
    ready, _ = state.loaded()
    body = await state.parse(len(raw), partial(_parse, raw, body_class, ready.max_model_len))
    # One of several models stands in the root of their union.
    one: Any = getattr(body, "root", body)
    state.warn_unknown(verify_supported(one))
    state.verify_model(one.model)
    return body


def _parse(raw: bytes, body_class: type[B], max_model_len: int) -> B:
    verify_shape(raw, max_model_len)
    return validate(body_class.model_validate_json, raw)


def verify_shape(raw: bytes, max_model_len: int) -> None:
    """Raise RequestError for a body with more parts than requests have any use for.

    Of a body that is no JSON only what stands before the error is counted rightly, and no parser
    comes further. Nesting is the parser's to bound: it takes 200 levels.
    """
    if len(raw) <= 2 * MAX_CONTAINERS:
        return
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    _verify_count(raw.count(b'"') // 2, MAX_STRINGS, "strings")
    outside = b"".join(raw.split(b'"')[::2])
    num_containers = outside.count(b"[") + outside.count(b"{")
    _verify_count(num_containers, MAX_CONTAINERS, "lists and objects")
    # A prompt of token ids, and as much again for others.
    most = max(LEAST_MAX_VALUES, 2 * max_model_len)
    _verify_count(outside.count(b",") + num_containers, most, "values")


def _verify_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise RequestError(
            f"The body has {count} {what}; at most {most} are taken. Send less in a request."
        )
