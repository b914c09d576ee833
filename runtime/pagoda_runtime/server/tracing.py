"""OpenTelemetry traces: a span for each prompt that reached the engine, sent to a collector."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pagoda_runtime.logs import request_id
from pagoda_runtime.metrics import RequestClock

if TYPE_CHECKING:
    from pagoda_runtime.client.output_processor import OutputProcessor
    from pagoda_runtime.server.answer import Answer

TRACE_HEADERS = ("traceparent", "tracestate")
trace_headers: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""W3C's trace context, as the headers of the request that this task answers have it."""

# So long a collector that does not answer may hold up the end of the server.
EXPORT_SECONDS = 5.0
# The names of vLLM, by those of the metrics.
_LATENCIES = {
    "time_to_first_token_seconds": "time_to_first_token",
    "e2e_request_latency_seconds": "e2e",
    "request_queue_time_seconds": "time_in_queue",
    "request_inference_time_seconds": "time_in_model_inference",
    "request_prefill_time_seconds": "time_in_model_prefill",
    "request_decode_time_seconds": "time_in_model_decode",
    "request_time_per_output_token_seconds": "time_per_output_token",
}
_OF_PARAMS = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")


class Tracer:
    """Makes spans of requests; a thread of OpenTelemetry's sends them, some seconds later.

    OpenTelemetry's own environment variables count: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS and others.

    Args:
        endpoint: URL of a collector that takes OTLP over HTTP.
    """

    def __init__(self, endpoint: str) -> None:
        # Within the function, because servers without traces do without its half second.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = Resource({"service.name": "pagoda", "service.version": version("pagoda-serve")})
        self._provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pagoda")
        self._read_parent = TraceContextTextMapPropagator().extract

    def follow(
        self, answer: Answer, clock: RequestClock, outputs: OutputProcessor
    ) -> Callable[[str, Mapping[str, float]], None]:
        """What the clock of a request calls at its end, with the reason and its times."""
        from opentelemetry.trace import SpanKind, StatusCode

        parent = self._read_parent(trace_headers.get() or {})
        asked = _describe_request(answer, clock)

        def record(reason: str, seconds: Mapping[str, float]) -> None:
            ended = time.time_ns()
            span = self._tracer.start_span(
                f"{asked['gen_ai.operation.name']} {answer.model}",
                context=parent,
                kind=SpanKind.SERVER,
                start_time=ended - int(1e9 * (time.monotonic() - clock.arrival)),
                attributes={
                    **asked,
                    "gen_ai.usage.input_tokens": clock.num_prompt_tokens,
                    "gen_ai.usage.output_tokens": clock.num_tokens,
                    "gen_ai.usage.cache_read.input_tokens": outputs.num_cached_tokens,
                    "gen_ai.response.finish_reasons": [reason],
                    **{f"gen_ai.latency.{_LATENCIES[n]}": value for n, value in seconds.items()},
                },
            )
            if reason == "error":
                span.set_status(StatusCode.ERROR)
            span.end(ended)

        return record

    def close(self) -> None:
        """Send what is left. Blocks for some seconds at most."""
        self._provider.shutdown()


def _describe_request(answer: Answer, clock: RequestClock) -> dict[str, Any]:
    params = answer.params
    named = {
        "operation.name": "chat" if answer.is_chat else "text_completion",
        "provider.name": "pagoda",
        "request.id": request_id.get(),
        "request.model": answer.model,
        "request.choice.count": params.n,
        "request.max_tokens": clock.max_tokens,
        "request.stop_sequences": params.stop or None,
        **{f"request.{name}": getattr(params, name) for name in _OF_PARAMS},
        "response.id": answer.id,
        "response.model": answer.model,
    }
    return {f"gen_ai.{name}": value for name, value in named.items() if value is not None}
