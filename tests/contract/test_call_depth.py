"""One request's calls, from the route's handler to a kernel, are those that the docs list."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

from pagoda_kernels.cpu.threads import ThreadedKernel
from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.process import make_core, serve
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest, Shutdown, StepOutput, ToEngine
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.server.app import create_app
from pagoda_runtime.server.testing import FAKE_ENGINE_COMMAND, make_config, make_state

DOCS = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "engine.md"
MOST_CALLS = 11
# A product of matrices goes through its layer, its format, and the form its weights are packed in.
MOST_MORE_OF_PRODUCTS = 2


def listed(heading: str) -> list[str]:
    """The code in the first column of the table under a heading of the docs."""
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def our_calls(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """(module, function) of each frame of ours and of the web framework, the innermost first."""
    while frame is not None:
        module = frame.f_globals["__name__"]
        if module.startswith(("pagoda_", "starlette.", "fastapi.")):
            yield module, frame.f_code.co_qualname
        frame = frame.f_back


async def send_request(monkeypatch: pytest.MonkeyPatch) -> tuple[EngineRequest, list[str]]:
    """What the server sends to its engine for a chat, and its own calls until then."""
    sent: list[tuple[ToEngine, list[tuple[str, str]]]] = []
    send = EngineClient._send

    def follow(client: EngineClient, message: ToEngine) -> None:
        sent.append((message, list(our_calls(sys._getframe(1)))))
        send(client, message)

    monkeypatch.setattr(EngineClient, "_send", follow)
    config = make_config()
    engine = EngineClient(
        EngineConfig(model='fake:{"vocab_size": 256}'), command=FAKE_ENGINE_COMMAND
    )
    try:
        await engine.wait_ready()
        transport = httpx.ASGITransport(create_app(make_state(engine, config)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            message = {"role": "user", "content": "Hi"}
            body = {"messages": [message], "max_tokens": 2, "temperature": 0}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
    finally:
        await engine.shutdown()
    request, calls = sent[0]
    assert isinstance(request, EngineRequest)
    ours = itertools.takewhile(lambda call: call[0].startswith("pagoda_"), calls)
    return request, [name for _, name in ours][::-1]


class OneRequest:
    """Both sockets of an engine that serves one request and is shut down."""

    def __init__(self, request: EngineRequest) -> None:
        self.messages: list[ToEngine] = [request]

    def wait(self, milliseconds: int | None = None) -> bool:
        return True

    def drain(self) -> Iterator[ToEngine]:
        while self.messages:
            yield self.messages.pop()

    def send(self, output: StepOutput) -> None:
        if any(delta.is_last for delta in output.deltas):
            self.messages.append(Shutdown())


def follow_to_kernels(
    request: EngineRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, list[str]]]:
    """(module of the kernel, the engine's calls until it) for each launch that a request causes."""
    launches: list[tuple[str, list[str]]] = []
    launch = ThreadedKernel.__call__

    def follow(kernel: ThreadedKernel, *arguments: Any) -> None:
        calls = [name for _, name in our_calls(sys._getframe(1))][::-1]
        launches.append((kernel._function.__module__, [*calls, "ThreadedKernel.__call__"]))
        launch(kernel, *arguments)

    monkeypatch.setattr(ThreadedKernel, "__call__", follow)
    config = EngineConfig(
        model=str(folder), dtype="bfloat16", kv_cache_memory_bytes=2**22, num_threads=1
    )
    core = make_core(config, ModelRunner(config, lambda *_: None))
    sockets = OneRequest(request)
    serve(core, sockets, sockets)
    return launches


async def test_the_calls_of_a_request_are_those_of_the_docs(tmp_path, monkeypatch):
    request, api_calls = await send_request(monkeypatch)
    launches = follow_to_kernels(request, make_tiny_checkpoint(tmp_path), monkeypatch)
    # The last one decodes; those before it are the prompt's.
    to_attention = [calls for module, calls in launches if ".attention." in module][-1]
    assert [*api_calls, *to_attention] == listed("From the route to the kernel")
    assert len(api_calls) == 3
    assert len(api_calls) + len(to_attention) <= MOST_CALLS
    deepest = max((calls for _, calls in launches), key=len)
    assert len(api_calls) + len(deepest) <= MOST_CALLS + MOST_MORE_OF_PRODUCTS, deepest
