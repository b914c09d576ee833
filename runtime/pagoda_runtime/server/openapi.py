"""/openapi.json and /docs: what the server answers, from `route_table`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from msgspec import Struct
from msgspec.json import schema_components
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette import routing
from starlette.requests import Request
from starlette.responses import Response

from pagoda_runtime.server.docs_page import render_page
from pagoda_runtime.server.errors import json_response
from pagoda_runtime.server.route_table import DOCUMENTED, Route

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_HEADERS = {
    "x-request-id": "The request's own id, or a new one.",
    "x-pagoda-load": "The object of GET /load, as JSON.",
}


def make_routes(*, are_keys_asked: bool, root_path: str = "") -> list[routing.Route]:
    """GET /openapi.json and /docs; neither asks for a key."""

    # Not coroutines: the first call takes some 50 ms, which a thread spends beside the streams.
    def show_document(request: Request) -> Response:
        document = build_document(are_keys_asked=are_keys_asked)
        servers = {"servers": [{"url": root_path}]} if root_path else {}
        return json_response({**document, **servers})

    def show_docs(request: Request) -> Response:
        page = render_page(build_document(are_keys_asked=are_keys_asked))
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        headers = {"content-security-policy": policy}
        return Response(page, media_type="text/html", headers=headers)

    return [routing.Route("/openapi.json", show_document), routing.Route("/docs", show_docs)]


@cache
def build_document(*, are_keys_asked: bool) -> Json:
    """The OpenAPI document of a server."""
    written = {
        r: None for route in DOCUMENTED for r in (route.answer, route.chunk) if r is not None
    }
    written |= {route.error: None for route in DOCUMENTED}
    _, schemas = schema_components([*written], ref_template=_SCHEMAS + "{name}")
    _, bodies = models_json_schema(
        [(route.body, "validation") for route in DOCUMENTED if route.body is not None],
        ref_template=_SCHEMAS + "{model}",
    )
    requested = _rename(bodies["$defs"], schemas.keys())
    paths: dict[str, Json] = {}
    for route in DOCUMENTED:
        operation = _describe(route, are_keys_asked=are_keys_asked)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagoda", "version": version("pagoda-serve")},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **requested},
            "headers": {
                name: {"description": text, "schema": {"type": "string"}}
                for name, text in _HEADERS.items()
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _rename(definitions: Json, taken: Collection[str]) -> Json:
    """Definitions of which none has a name that is taken: what is sent is called a Param then."""
    text = json.dumps(definitions)
    for name in taken:
        text = text.replace(f'"{_SCHEMAS}{name}"', f'"{_SCHEMAS}{name}Param"')
    renamed = json.loads(text)
    return {f"{name}Param" if name in taken else name: d for name, d in renamed.items()}


def _describe(route: Route, *, are_keys_asked: bool) -> Json:
    parameters: list[Json] = [
        {
            "name": "X-Request-Id",
            "in": "header",
            "description": "Comes back in the answer, and stands in the log.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        }
    ]
    for name in re.findall(r"{(\w+)}", route.path):
        schema = {"type": "string"}
        parameters += [{"name": name, "in": "path", "required": True, "schema": schema}]
    operation: Json = {
        "operationId": f"{route.method}_{route.path.strip('/')}".lower().replace("/", "_"),
        "summary": route.summary,
        "parameters": parameters,
        "responses": _describe_answers(route),
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _json_of(route.body)}
    if route.is_keyed and are_keys_asked:
        operation["security"] = [{"key": []}]
    return operation


def _describe_answers(route: Route) -> Json:
    if route.answer is None:
        content: Json = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = _json_of(route.answer)
    described = {"200": _describe_answer(200, content)}
    events = f"Their kinds are {route.events}." if route.events else ""
    if route.chunk is not None:
        events = (
            f"The data of each is a {route.chunk.__name__} ({_SCHEMAS}{route.chunk.__name__}), or "
            "an Error where the answer breaks off; that of the last one is [DONE]."
        )
    if events:
        text = f"With `stream: true`: server-sent events. {events}"
        content["text/event-stream"] = {"schema": {"description": text}}
    if route.unready:
        described["503"] = _describe_answer(503, content)
    for status in route.errors:
        described[str(status)] = _describe_answer(status, _json_of(route.error))
    return described


def _describe_answer(status: int, content: Json) -> Json:
    headers: Json = {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS}
    if status in (429, 503):
        headers["retry-after"] = {"description": "Seconds.", "schema": {"type": "integer"}}
    return {"description": HTTPStatus(status).phrase, "headers": headers, "content": content}


def _json_of(model: type[BaseModel | Struct]) -> Json:
    return {"application/json": {"schema": {"$ref": _SCHEMAS + model.__name__}}}
