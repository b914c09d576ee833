"""What probes, scalers and dashboards see."""

from __future__ import annotations

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda_runtime.ipc.messages import EngineFailed, EngineStats
from pagoda_runtime.server.health import find_problem
from pagoda_runtime.server.testing import READY, FakeEngine, make_config, make_state

LOAD_FIELDS = {"running", "waiting", "slots", "kv_usage", "preemptions_total", "finished_total"}


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    """Name and labels except model_name → value."""
    text = (await http.get("/metrics")).text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            values[" ".join([sample.name, *labels.values()])] = sample.value
    return values


async def test_a_loading_server_is_alive_but_neither_started_nor_ready(http, state, engine):
    engine.ready = None
    startup = await http.get("/startup")
    assert startup.status_code == 503
    assert startup.json() == {
        "phase": "load",
        "percent": 40.0,
        "bytes_per_second": 1e6,
        "eta_seconds": 9.0,
    }
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 200


async def test_a_loaded_server_is_started_ready_and_alive(http):
    for path in ("/startup", "/ready", "/health"):
        assert (await http.get(path)).status_code == 200


async def test_a_loaded_server_tells_what_runs(http):
    assert (await http.get("/startup")).json()["model"] == {
        "architecture": "LlamaForCausalLM",
        "quantization": "none",
        "kv_cache_dtype": "float32",
        "tensor_parallel_size": 1,
        "task": "generate",
    }


async def test_a_model_without_its_tokenizer_is_not_ready(http, state):
    state.tokenizer = None
    assert (await http.get("/startup")).status_code == 503
    assert (await http.get("/ready")).status_code == 503


async def test_a_draining_server_is_started_and_alive_but_not_ready(http, state):
    state.is_draining = True
    ready = await http.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert ready.headers["connection"] == "close"
    assert (await http.get("/startup")).status_code == 200
    assert (await http.get("/health")).status_code == 200


async def test_a_dead_engine_is_neither_alive_nor_ready(http, engine):
    engine.failure = EngineFailed(reason="RankDied", message="it crashed")
    health = await http.get("/health")
    assert health.status_code == 503
    assert "it crashed" in health.text
    assert (await http.get("/ready")).status_code == 503


class StalledEngine(FakeEngine):
    """An engine whose stats a test chooses."""

    counts = EngineStats()

    @property
    def stats(self) -> EngineStats:
        return self.counts


def test_health_fails_only_if_work_waits_and_no_step_ends():
    engine = StalledEngine(make_config().engine)
    state = make_state(engine, make_config("--stall-seconds", "10"))
    now = time.monotonic()
    engine.last_step_seconds = now - 11
    assert find_problem(state, now) is None, "an idle engine makes no steps"
    engine.counts = EngineStats(waiting=1)
    assert "--stall-seconds 10" in (find_problem(state, now) or "")
    engine.last_step_seconds = now - 9
    assert find_problem(state, now) is None


async def test_load_and_the_header_of_every_answer_have_the_same_fields(http, state):
    load = (await http.get("/load")).json()
    assert set(load) == LOAD_FIELDS
    assert load["slots"] == 256
    for path in ("/load", "/health", "/metrics", "/nowhere", "/v1/models"):
        header = (await http.get(path)).headers["x-pagoda-load"]
        assert httpx.Response(200, text=header).json() == load


async def test_the_version_is_the_package_s(http):
    assert (await http.get("/version")).json()["version"].count(".") == 2


async def test_every_series_is_there_at_0_from_the_start(http, engine):
    engine.ready = None
    values = await scrape(http)
    expected = [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total stop",
        "vllm:request_success_total length",
        "vllm:request_success_total abort",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:request_time_per_output_token_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_inference_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "vllm:request_prompt_tokens_count",
        "vllm:request_generation_tokens_count",
        "vllm:request_params_max_tokens_count",
        "vllm:iteration_tokens_total_count",
    ]
    assert {name: values.get(name) for name in expected} == dict.fromkeys(expected, 0.0)
    assert values["http_requests_total /v1/completions POST 5xx"] == 0.0


async def test_a_request_is_counted_everywhere(http):
    body = {"prompt": "abc", "max_tokens": 5}
    await http.post("/v1/completions", json=body)
    values = await scrape(http)
    assert values["vllm:prompt_tokens_total"] == 3
    assert values["vllm:generation_tokens_total"] == 5
    assert values["vllm:request_success_total length"] == 1
    assert values["vllm:inter_token_latency_seconds_count"] == 4
    assert values["vllm:iteration_tokens_total_count"] == 5
    assert values["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.001)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert values[f"vllm:{name}_count"] == 1


async def test_http_requests_are_counted_by_route_and_never_by_unknown_paths(http):
    for path in ("/v1/models", "/v1/models/tiny", "/secret-1", "/secret-2"):
        await http.get(path)
    text = (await http.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/models",method="GET",status="2xx"} 1.0' in text
    assert 'handler="/v1/models/{model}",method="GET",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="other",method="GET",status="4xx"} 2.0' in text
    assert "secret" not in text


async def test_the_cache_s_facts_are_labels(http):
    text = (await http.get("/metrics")).text
    assert f'num_gpu_blocks="{READY.num_blocks}"' in text
