"""Figures of known records."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda_runtime.bench.endpoint import RequestRecord
from pagoda_runtime.bench.summary import format_summary, percentile, summarize


def record(start: float, ttft: float, gaps: list[float], **fields: object) -> RequestRecord:
    return RequestRecord(
        started=start,
        ended=start + ttft + sum(gaps),
        time_to_first_token=ttft,
        gaps=gaps,
        num_prompt_tokens=10,
        num_output_tokens=len(gaps) + 1,
        is_counted_by_server=True,
        **fields,
    )


def summary(*records: RequestRecord, num_unsent: int = 0) -> dict:
    return {**summarize(records, num_unsent=num_unsent), "client_cpu_share": 0.1}


def test_figures_follow_from_the_records():
    result = summary(record(1.0, 0.5, [0.1, 0.3]), record(2.0, 0.7, [0.2, 0.1]))
    assert result["duration"] == pytest.approx(2.0)
    assert result["request_throughput"] == pytest.approx(1.0)
    assert result["output_throughput"] == pytest.approx(3.0)
    assert result["total_token_throughput"] == pytest.approx(13.0)
    assert result["mean_ttft_ms"] == pytest.approx(600)
    assert result["median_itl_ms"] == pytest.approx(150)
    assert result["p99_itl_ms"] == pytest.approx(np.percentile([100, 300, 200, 100], 99))
    assert result["mean_tpot_ms"] == pytest.approx((200 + 150) / 2)
    assert result["p50_e2el_ms"] == pytest.approx(950)


@pytest.mark.parametrize("percent", [0, 10, 50, 99, 100])
def test_percentiles_are_those_of_numpy(percent):
    data = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert percentile(data, percent) == pytest.approx(np.percentile(data, percent))


def test_failures_are_counted_by_kind_and_kept_out_of_the_latencies():
    failed = RequestRecord(started=0.0, ended=9.0, failure="HTTP 429", detail="full")
    result = summary(record(1.0, 0.5, []), failed, failed, num_unsent=4)
    assert (result["completed"], result["failed"], result["not_sent"]) == (1, 2, 4)
    assert result["failures"] == {"HTTP 429": 2}
    assert result["mean_e2el_ms"] == pytest.approx(500)
    table = format_summary(result)
    assert "2 × HTTP 429" in table
    assert "HTTP 429: full" in table


def test_a_run_without_a_completed_request_has_no_latencies():
    result = summary(RequestRecord(started=0.0, ended=0.0, failure="timeout"))
    assert result["p99_ttft_ms"] is None
    assert result["output_throughput"] is None
    assert "–" in format_summary(result)


def test_the_table_says_when_tokens_are_chunks():
    counted = record(1.0, 0.5, [0.1])
    counted.is_counted_by_server = False
    result = summary(counted)
    assert result["output_tokens_from"] == "chunks"
    assert "the server sends no usage" in format_summary(result)
