"""Errors in OpenAI's shape: {"error": {message, type, param, code}}, or in Anthropic's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from pagoda_runtime.errors import (
    EngineDead,
    ModelNotServed,
    PagodaError,
    PromptTooLong,
    QueueFull,
    RequestError,
    Unavailable,
    shown,
)
from pagoda_runtime.server.answers import Error, ErrorDetails
from pagoda_runtime.server.messages_answers import AnthropicError, AnthropicErrorDetails

T = TypeVar("T")
M = TypeVar("M")

CLIENT_CLOSED_REQUEST = 499
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
BAD_REQUEST_TYPE = "invalid_request_error"
MAX_SHOWN_PROBLEMS = 3
# An answer must not repeat megabytes of a request, whatever of it a message quotes.
MAX_MESSAGE_CHARACTERS = 2000
MAX_PATH_PART_CHARACTERS = 80
# Names of a union's members, which pydantic puts into the path of a field; so do those with "[".
UNION_TAGS = frozenset({"str", "constrained-str"})
# A client that comes back after this finds the replacement of a dead process, if there is one.
DEAD_RETRY_SECONDS = 5


class ApiError(PagodaError):
    """An answer with this status; everything a client needs to know about what went wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = BAD_REQUEST_TYPE,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > MAX_MESSAGE_CHARACTERS:
            half = MAX_MESSAGE_CHARACTERS // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = Error(ErrorDetails(message, kind, param, code))

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)

    def to_response(self, path: str = "") -> Response:
        """The answer, in the form that clients of this path know."""
        body = to_anthropic(self) if is_anthropic(path) else self.body
        return json_response(body, self.status, self.headers)


def is_anthropic(path: str) -> bool:
    """Whether clients of this path know errors as Anthropic has them."""
    return f"{path}/".startswith(f"{ANTHROPIC_PATH}/")


def to_anthropic(error: ApiError) -> AnthropicError:
    """The same error as Anthropic has it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    if kind == "api_error" and error.status < 500:
        kind = BAD_REQUEST_TYPE
    return AnthropicError(AnthropicErrorDetails(kind, str(error)))


def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def to_api_error(error: Exception) -> ApiError:
    """The answer to an exception of a route; an unknown exception is a 500 that says nothing."""
    match error:
        case ApiError():
            return error
        case ModelNotServed():
            return ApiError(404, error.message, param="model", code="model_not_found")
        case PromptTooLong():
            return ApiError(400, error.message, param=error.param, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, error.message, param=error.param)
        case QueueFull():
            return _later(429, "queue_full", error, error.retry_after_seconds)
        case Unavailable():
            return _later(503, "unavailable", error, error.retry_after_seconds)
        case EngineDead():
            return _later(503, "engine_dead", error, DEAD_RETRY_SECONDS)
    return ApiError(500, "Internal error; the server's log has it.", kind="server_error")


def _later(status: int, code: str, error: Exception, seconds: int) -> ApiError:
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    headers = {"retry-after": str(seconds)}
    return ApiError(status, str(error), kind=kind, code=code, headers=headers)


def validate(make: Callable[[T], M], values: T) -> M:
    """The model that pydantic makes of the values of a body.

    Raises: ApiError with the first problems, and the path of the first field as param.
    """
    try:
        return make(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"The body is no JSON: {first['msg']}.", code="invalid_json")
    described = [_describe_problem(problem) for problem in problems[:MAX_SHOWN_PROBLEMS]]
    if len(problems) > MAX_SHOWN_PROBLEMS:
        described.append(f"and {len(problems) - MAX_SHOWN_PROBLEMS} more")
    raise ApiError(400, "; ".join(described), param=_path(first["loc"]) or None)


def _describe_problem(problem: Any) -> str:
    path, message = _path(problem["loc"]), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{path} is missing"
    return f"{path or 'The body'}: {message}, got {shown(problem['input'])}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in UNION_TAGS:
            path += f".{part[:MAX_PATH_PART_CHARACTERS]}"
    return path.removeprefix(".")


async def _answer_error(request: Request, error: Exception) -> Response:
    # An unknown one is raised again by starlette after the answer, and logged by uvicorn.
    return to_api_error(error).to_response(request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    # For the log and the metrics.
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    match error.status_code:
        case 404:
            message, code = f"There is no {method} {path} here.", "not_found"
        case 405:
            # HEAD goes with GET; starlette tells both, in any order.
            allowed = min((error.headers or {}).get("Allow", "another method").split(", "))
            message, code = f"{path} takes {allowed}, not {method}.", "method_not_allowed"
        case status:
            message, code = error.detail, HTTPStatus(status).name.lower()
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, code=code, headers=headers).to_response(path)


_HANDLERS: dict[int | type[Exception], Any] = {
    PagodaError: _answer_error,
    ClientDisconnect: _answer_nobody,
    HTTPException: _answer_http_exception,
    Exception: _answer_error,
}


def make_app(routes: Sequence[BaseRoute]) -> FastAPI:
    """An application that answers every exception of its routes in the shape of their API.

    The routes are Starlette's, because they read their bodies themselves, on a thread of their own
    choice; and the document of the API is made by `openapi`.
    """
    return FastAPI(
        routes=[*routes],
        exception_handlers=_HANDLERS,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
