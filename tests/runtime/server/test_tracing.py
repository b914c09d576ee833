"""Spans of requests, as a collector of OpenTelemetry gets them over HTTP."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server import tracing
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server
from pagoda_runtime.server.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}


class Collector(HTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[ExportTraceServiceRequest] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.01,))
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    found = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


async def test_a_request_is_a_span_of_its_callers_trace(collector):
    config = make_config("--served-model-name", "tiny")
    state = make_state(FakeEngine(config.engine, step_seconds=0.002), config)
    state.tracer = Tracer(collector.url)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "temperature": 0.5}
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        before = time.time_ns()
        answer = await http.post("/v1/chat/completions", json=body, headers=HEADERS)
        await http.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True})
    state.tracer.close()
    chat, *others = collector.spans
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (TRACE, PARENT)
    assert (chat.name, chat.kind) == ("chat tiny", Span.SPAN_KIND_SERVER)
    assert before < chat.start_time_unix_nano < chat.end_time_unix_nano < time.time_ns()
    found, usage = attributes(chat), answer.json()["usage"]
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.id"] == "mine"
    assert found["gen_ai.response.id"] == answer.json()["id"]
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "tiny"
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.max_tokens"]) == (0.5, 8)
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 8
    assert found["gen_ai.usage.cache_read.input_tokens"] == 4
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    first, e2e = (found[f"gen_ai.latency.{n}"] for n in ("time_to_first_token", "e2e"))
    assert 0.002 <= first < e2e
    assert found["gen_ai.latency.time_in_model_decode"] == pytest.approx(e2e - first)
    assert found["gen_ai.latency.time_in_queue"] == 0.001
    # Each prompt of a request has a span; without a caller's trace it begins one.
    assert [span.name for span in others] == ["text_completion tiny"] * 2
    assert all(span.trace_id.hex() != TRACE and not span.parent_span_id for span in others)


async def test_messages_and_responses_have_the_id_of_their_trace(collector):
    config = make_config()
    state = make_state(FakeEngine(config.engine), config)
    state.tracer = Tracer(collector.url)
    messages = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        message = await http.post("/v1/messages", json=messages)
        response = await http.post("/v1/responses", json={"input": "a", "max_output_tokens": 2})
    state.tracer.close()
    traced = [attributes(span)["gen_ai.response.id"].partition("-")[2] for span in collector.spans]
    assert [answer.json()["id"] for answer in (message, response)] == [
        f"msg_{traced[0]}",
        f"resp_{traced[1]}",
    ]


async def test_a_request_that_fails_is_told_as_such(collector):
    config = make_config()
    engine = FakeEngine(config.engine)
    state = make_state(engine, config)
    state.tracer = Tracer(collector.url)
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        body = {"prompt": "a", "max_tokens": 100, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            engine.failure = EngineFailed(reason="RankDied", message="gone")
            await answer.aread()
    state.tracer.close()
    (span,) = collector.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["gen_ai.response.finish_reasons"] == ["error"]


async def test_the_name_of_the_service_is_ours_or_that_of_the_environment(collector, monkeypatch):
    names = []
    for name in (None, "mine"):
        if name is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        tracer = Tracer(collector.url)
        names.append(tracer._provider.resource.attributes["service.name"])
        tracer.close()
    assert names == ["pagoda", "mine"]


async def test_a_collector_that_is_not_there_costs_the_end_a_bounded_time(monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 0.3)
    config = make_config()
    state = make_state(FakeEngine(config.engine), config)
    state.tracer = Tracer("http://127.0.0.1:9/v1/traces")
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    began = time.monotonic()
    state.tracer.close()
    assert time.monotonic() - began < 5
