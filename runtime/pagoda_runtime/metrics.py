"""Every metric of the server: name, labels, unit and help.

The names and buckets are vLLM's, so that its dashboards, scalers and endpoint pickers work. Every
series exists at 0 from the start. What the engine counts itself is read when somebody scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from pagoda_runtime.ipc.messages import EngineReady, EngineStats, RequestDelta, StepOutput

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# 1-2-5 up to contexts of a million tokens: the real bound is known only when the model is.
TOKEN_COUNTS = tuple(digit * 10**exponent for exponent in range(6) for digit in (1, 2, 5))
GRAMMAR_SECONDS = (0.0001, 0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

FINISHED_REASONS = ("stop", "length", "abort", "error")
STATUS_CLASSES = ("2xx", "4xx", "5xx")

_SINCE_ARRIVAL = "Seconds from a request's arrival to its"
_SINCE_FIRST_STEP = "Seconds from a request's first step to its"
# By their buckets: name and help.
HISTOGRAMS: dict[tuple[float, ...], dict[str, str]] = {
    FIRST_TOKEN_SECONDS: {"time_to_first_token_seconds": f"{_SINCE_ARRIVAL} first token."},
    TOKEN_SECONDS: {
        "inter_token_latency_seconds": "Seconds between two tokens of a request.",
        "request_time_per_output_token_seconds": (
            "Seconds per token after the first, mean of a request."
        ),
    },
    REQUEST_SECONDS: {
        "e2e_request_latency_seconds": f"{_SINCE_ARRIVAL} last token.",
        "request_queue_time_seconds": f"{_SINCE_ARRIVAL} first step.",
        "request_inference_time_seconds": f"{_SINCE_FIRST_STEP} last token.",
        "request_prefill_time_seconds": f"{_SINCE_FIRST_STEP} first token.",
        "request_decode_time_seconds": "Seconds from a request's first token to its last.",
    },
    TOKEN_COUNTS: {
        "request_prompt_tokens": "Prompt tokens of a request.",
        "request_generation_tokens": "Generated tokens of a request, over all its choices.",
        "request_params_max_tokens": "max_tokens of a request.",
    },
    GRAMMAR_SECONDS: {
        "grammar_compile_seconds": "Seconds until a request's grammar was compiled, or refused."
    },
    STEP_TOKENS: {"iteration_tokens_total": "Tokens that one step computes."},
}


class LoadSource(Protocol):
    """What the gauges show: the server's state, read at the time of a scrape."""

    @property
    def ready(self) -> EngineReady | None: ...

    def engine_counts(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class EngineCollector:
    """Shows the engine's own gauges and counters, current at each scrape."""

    model_name: str
    source: LoadSource

    def collect(self) -> Iterator[Metric]:
        counts = self.source.engine_counts()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        kv_help = "Used part of the KV cache's blocks, 0 to 1."
        old_help = f"Old name of kv_cache_usage_perc. {kv_help}"
        waste = "Slots of held KV blocks without keys and values, over all their slots, 0 to 1."
        running = "Sequences that the engine runs; a request has one for each of its choices."
        waiting = "Accepted requests that do not run, those being tokenized included."
        queries = "Prompt tokens looked up in the prefix cache."
        hits = "Prompt tokens found in the prefix cache."
        preemptions = "Times that a running request gave up its blocks."
        for family, name, help_text, value in (
            (gauge, "num_requests_running", running, counts.running),
            (gauge, "num_requests_waiting", waiting, counts.waiting),
            (gauge, "kv_cache_usage_perc", kv_help, counts.kv_usage),
            (gauge, "kv_cache_waste_perc", waste, counts.kv_waste),
            (gauge, "gpu_cache_usage_perc", old_help, counts.kv_usage),
            (counter, "prefix_cache_queries", queries, counts.prefix_cache_queries),
            (counter, "prefix_cache_hits", hits, counts.prefix_cache_hits),
            (counter, "num_preemptions", preemptions, counts.preemptions_total),
        ):
            metric = family(f"vllm:{name}", help_text, labels=["model_name"])
            metric.add_metric([self.model_name], value)
            yield metric
        yield self._cache_config()

    def _cache_config(self) -> Metric:
        ready = self.source.ready
        labels = {
            "model_name": self.model_name,
            "block_size": str(ready.block_size) if ready else "0",
            "num_gpu_blocks": str(ready.num_blocks) if ready else "0",
            "cache_dtype": ready.kv_cache_dtype if ready else "",
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "1, with the KV cache's facts as labels; 0 until the model is loaded.",
            labels=list(labels),
        )
        info.add_metric(list(labels.values()), 1 if ready else 0)
        return info


class Metrics:
    """The registry of one server and the few calls that feed it."""

    def __init__(self, model_name: str, source: LoadSource, handlers: Iterable[str] = ()) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(EngineCollector(model_name, source))
        ProcessCollector(registry=self.registry)
        self._add_counters()
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            ).labels(model_name)
            for buckets, texts in HISTOGRAMS.items()
            for name, text in texts.items()
        }
        # Fed at every token.
        self.inter_token = self._histograms["inter_token_latency_seconds"]
        self._add_http(handlers)

    def _add_counters(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began.")
        self.num_generated_tokens = 0
        """Since the last scrape: a counter's lock would cost more than a token's text."""
        self.generation_tokens = self._counter(
            "generation_tokens", "Generated tokens of answers, up to what stopped each choice."
        )
        self.grammar_failures = self._counter(
            "grammar_failures", "Requests refused because of their grammar."
        )
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.finished = {
            reason: success.labels(self.model_name, reason) for reason in FINISHED_REASONS
        }

    def _add_http(self, handlers: Iterable[str]) -> None:
        self.http_requests = Counter(
            "http_requests",
            "HTTP requests by method, class of status, and route.",
            ["method", "status", "handler"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from an HTTP request's arrival to the end of its answer.",
            ["method", "handler"],
            buckets=HTTP_SECONDS,
            registry=self.registry,
        )
        for route in handlers:
            method, handler = route.split(" ")
            self.http_seconds.labels(method, handler)
            for status in STATUS_CLASSES:
                self.http_requests.labels(method, status, handler)

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(f"vllm:{name}", help_text, ["model_name"], registry=self.registry)
        return counter.labels(self.model_name)

    def observe(self, name: str, value: float) -> None:
        """Add to one of HISTOGRAMS."""
        self._histograms[name].observe(value)

    def observe_step(self, output: StepOutput) -> None:
        """Take what the engine tells after each step."""
        if output.stats.num_scheduled_tokens:
            self.observe("iteration_tokens_total", output.stats.num_scheduled_tokens)

    def observe_http(self, method: str, status: int, handler: str, elapsed: float) -> None:
        self.http_requests.labels(method, f"{status // 100}xx", handler).inc()
        self.http_seconds.labels(method, handler).observe(elapsed)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        self.generation_tokens.inc(self.num_generated_tokens)
        self.num_generated_tokens = 0
        return generate_latest(self.registry)


@dataclass(slots=True)
class RequestClock:
    """Measures one engine request; `finish` must be called once, whatever its end was."""

    metrics: Metrics
    arrival: float
    """time.monotonic()"""
    num_prompt_tokens: int
    max_tokens: int
    on_finish: Callable[[str, Mapping[str, float]], None] | None = None
    """Told the reason and the times at the end."""
    num_tokens: int = 0
    _queue_seconds: float = 0.0
    _first: float = 0.0
    _last: float = 0.0
    _last_of_choice: dict[int, float] = field(default_factory=dict)

    def observe(self, delta: RequestDelta, num_counted: int) -> None:
        """Take a delta that just came; num_counted of its tokens are part of the answer."""
        # A pooled answer comes once, as a first and last token would.
        num_new = len(delta.new_token_ids) or int(delta.pooled is not None)
        if delta.queue_seconds is not None:
            self._queue_seconds = delta.queue_seconds
            self.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if not num_new:
            return
        now, metrics = time.monotonic(), self.metrics
        if not self._last_of_choice:
            self._first = now
            metrics.observe("time_to_first_token_seconds", now - self.arrival)
        # Tokens that came in one delta share the time since the last one of their choice.
        before = self._last_of_choice.get(delta.index)
        if before is None:
            num_gaps, gap = num_counted - 1, 0.0
        else:
            num_gaps, gap = num_counted, (now - before) / num_new
        for _ in range(num_gaps):
            metrics.inter_token.observe(gap)
        metrics.num_generated_tokens += num_counted
        self.num_tokens += num_counted
        self._last = self._last_of_choice[delta.index] = now

    def finish(self, reason: str) -> None:
        """Record the whole request; reason is one of FINISHED_REASONS."""
        observe = self.metrics.observe
        self.metrics.finished[reason].inc()
        observe("request_prompt_tokens", self.num_prompt_tokens)
        observe("request_generation_tokens", self.num_tokens)
        observe("request_params_max_tokens", self.max_tokens)
        times = self._measure() if self._last_of_choice else {}
        for name, seconds in times.items():
            observe(name, seconds)
        if self.on_finish is not None:
            if times:
                times["time_to_first_token_seconds"] = self._first - self.arrival
            self.on_finish(reason, times)

    def _measure(self) -> dict[str, float]:
        e2e, decode = self._last - self.arrival, self._last - self._first
        times = {
            "e2e_request_latency_seconds": e2e,
            "request_decode_time_seconds": decode,
            "request_queue_time_seconds": self._queue_seconds,
            "request_inference_time_seconds": max(0.0, e2e - self._queue_seconds),
            "request_prefill_time_seconds": max(0.0, e2e - decode - self._queue_seconds),
        }
        num_choices = len(self._last_of_choice)
        if self.num_tokens > num_choices:
            per_token = decode * num_choices / (self.num_tokens - num_choices)
            times["request_time_per_output_token_seconds"] = per_token
        return times
