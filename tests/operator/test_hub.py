"""What is read of a hub: a server on this machine that behaves as one, well or badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pagoda_operator import hub as module
from pagoda_operator.checkpoint import Tensors
from pagoda_operator.hub import Answer, Hub, Unreadable
from pagoda_operator.testing import LLAMA_8B

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CONFIG = json.dumps(LLAMA_8B).encode()


class Files:
    """A hub with the files of one model; it counts the bytes that it is asked for."""

    def __init__(self, **files: bytes) -> None:
        self.files = {name.replace("__", "."): content for name, content in files.items()}
        self.asked: list[str] = []
        self.headers: list[Any] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.rel_url.raw_path.removeprefix("/org/model/resolve/"))
        self.headers.append(request.headers)
        content = self.files.get(request.path.rsplit("/", 1)[1])
        if content is None:
            raise web.HTTPNotFound
        if request.headers.get("If-None-Match") == '"1"':
            return web.Response(status=304)
        if (wanted := request.http_range).stop:
            return web.Response(status=206, body=content[wanted])
        return web.Response(body=content, headers={"ETag": '"1"'})


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Hub]]]:
    opened: list[Any] = []

    async def start(handler: Handler, token: str | None = None) -> Hub:
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        server = TestServer(app)
        await server.start_server()
        hub = Hub(str(server.make_url("")), token)
        opened.extend([hub, server])
        return hub

    yield start
    for one in opened:
        await one.close()


def make_file(head: dict[str, Any], weights: int = 0) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(weights)


async def test_the_index_says_how_large_the_weights_are(serve: Any) -> None:
    index = json.dumps({"metadata": {"total_size": 1000}, "weight_map": {}}).encode()
    files = Files(config__json=CONFIG)
    files.files["model.safetensors.index.json"] = index
    answer = await (await serve(files.answer)).read("org/model", None)
    assert answer == Answer({**LLAMA_8B}, Tensors(1000), '"1"')
    assert files.asked[0] == "main/config.json"


@pytest.mark.parametrize("num_tensors", [1, 3000])
async def test_without_an_index_only_the_head_of_the_one_file_is_read(
    serve: Any, num_tensors: int
) -> None:
    head = {
        f"tensor {i}": {"dtype": "F32", "shape": [2], "data_offsets": [i * 8, i * 8 + 8]}
        for i in range(num_tensors)
    }
    files = Files(config__json=CONFIG)
    files.files["model.safetensors"] = make_file(head, 1 << 20)
    answer = await (await serve(files.answer)).read("org/model", "refs/pr/1")
    assert answer.tensors == Tensors(8 * num_tensors, "float32")
    assert files.asked[-1] == "refs%2Fpr%2F1/model.safetensors"
    assert files.asked.count("refs%2Fpr%2F1/model.safetensors") == (2 if num_tensors > 1 else 1)


async def test_a_server_without_ranges_is_not_asked_for_the_weights(serve: Any) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/config.json"):
            return web.Response(body=CONFIG)
        if not request.path.endswith("model.safetensors"):
            raise web.HTTPNotFound
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(60)
        return response

    answered = await (await serve(answer)).read("org/model", None)
    assert answered.tensors == Tensors()


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, make_file({})[:8], b"\x05" + bytes(7)])
async def test_a_file_that_is_no_safetensors_has_no_size(serve: Any, content: bytes) -> None:
    files = Files(config__json=CONFIG)
    files.files["model.safetensors"] = content
    assert (await (await serve(files.answer)).read("org/model", None)).tensors == Tensors()


async def test_what_has_not_changed_is_not_read_again(serve: Any) -> None:
    files = Files(config__json=CONFIG)
    hub = await serve(files.answer)
    first = await hub.read("org/model", None)
    count = len(files.asked)
    assert await hub.read("org/model", None, first.etag) is None
    assert files.asked[count:] == ["main/config.json"]


async def test_what_gptqs_older_tools_wrote_beside_the_config_counts(serve: Any) -> None:
    old = json.dumps({"bits": 4, "group_size": 128}).encode()
    files = Files(config__json=CONFIG, quantize_config__json=old)
    answer = await (await serve(files.answer)).read("org/model", None)
    assert answer.config["quantization_config"] == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
    }


async def test_a_folder_of_any_web_server_tells_the_same(serve: Any) -> None:
    files = Files(config__json=CONFIG)
    hub = await serve(files.answer)
    answer = await hub.read_at(f"{hub.endpoint}/models/llama/")
    assert answer.config == LLAMA_8B
    assert files.asked[0] == "/models/llama/config.json"


async def test_a_token_is_sent_to_the_hub_alone(serve: Any) -> None:
    elsewhere = Files(config__json=CONFIG)
    there = await serve(elsewhere.answer)

    async def redirect(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        raise web.HTTPFound(there.endpoint.replace("127.0.0.1", "localhost") + request.path)

    hub = await serve(redirect, "secret")
    assert (await hub.read("org/model", None)).config == LLAMA_8B
    assert all("Authorization" not in headers for headers in elsewhere.headers)


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(200):
        await response.write(bytes(1 << 16))
    return response


def _status(code: int) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, text="<html>")

    return answer


async def _loop(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound(request.path)


async def _never(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise web.HTTPNotFound


@pytest.mark.parametrize(
    ("handler", "what"),
    [
        (_endless, "has more than 4 MiB"),
        (_status(401), r"for those with a token only \(HTTP 401\)"),
        (_status(404), "answers with HTTP 404"),
        (_status(503), "answers with HTTP 503"),
        (_status(200), "is not JSON"),
        (_loop, "cannot be read"),
        (_never, "did not answer within"),
    ],
    ids=["endless", "401", "404", "503", "no JSON", "redirects", "silent"],
)
async def test_a_hub_that_does_not_tell_is_unreadable(
    serve: Any, handler: Handler, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if handler is _never:
        monkeypatch.setattr(module, "READ_SECONDS", 0.05)
    with pytest.raises(Unreadable, match=what):
        await (await serve(handler)).read("org/model", None)


async def test_a_hub_that_is_not_there_is_unreadable() -> None:
    hub = Hub("http://127.0.0.1:9")
    with pytest.raises(Unreadable, match="cannot be reached"):
        await hub.read("org/model", None)
    await hub.close()
