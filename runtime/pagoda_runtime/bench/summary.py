"""What a run of requests showed, as numbers under vLLM's names and as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from pagoda_runtime.bench.endpoint import RequestRecord
from pagoda_runtime.errors import PagodaError

PERCENTILES = (50, 90, 95, 99)
# Name in the JSON → name in the table.
LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2el": "end to end",
}
MAX_SHOWN_DETAILS = 5


def summarize(records: Sequence[RequestRecord], *, num_unsent: int) -> dict[str, Any]:
    """Figures of a run; latencies in milliseconds, of the requests that were completed.

    itl holds every gap between two events with text, tpot one mean per request. A figure without
    a value is None.
    """
    done = [record for record in records if record.failure is None]
    failed = [record for record in records if record.failure is not None]
    duration = max((r.ended for r in records), default=0.0) - min(
        (r.started for r in records), default=0.0
    )
    num_input = sum(record.num_prompt_tokens or 0 for record in done)
    num_output = sum(record.num_output_tokens for record in done)
    latencies = {
        "ttft": [r.time_to_first_token for r in done if r.time_to_first_token is not None],
        "itl": [gap for record in done for gap in record.gaps],
        "tpot": [r.time_per_output_token for r in done if r.time_per_output_token is not None],
        "e2el": [record.end_to_end for record in done],
    }
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(failed),
        "not_sent": num_unsent,
        "failures": dict(Counter(record.failure for record in failed).most_common()),
        "failure_details": list(dict.fromkeys(f"{r.failure}: {r.detail}" for r in failed))[
            :MAX_SHOWN_DETAILS
        ],
        "total_input_tokens": num_input,
        "total_cached_input_tokens": sum(record.num_cached_tokens for record in done),
        "total_output_tokens": num_output,
        "input_tokens_known": all(record.num_prompt_tokens is not None for record in done),
        "output_tokens_from": _source_of_counts(done),
        "request_throughput": _per_second(len(done), duration),
        "output_throughput": _per_second(num_output, duration),
        "total_token_throughput": _per_second(num_input + num_output, duration),
    }
    for name, seconds in latencies.items():
        result |= summarize_latency(name, seconds)
    return result


def summarize_latency(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std and percentiles in milliseconds, as mean_ttft_ms and so on."""
    statistics = ["mean", "median", "std", *(f"p{p}" for p in PERCENTILES)]
    if not seconds:
        return {f"{statistic}_{name}_ms": None for statistic in statistics}
    data = sorted(1000 * value for value in seconds)
    values = [fmean(data), median(data), pstdev(data), *(percentile(data, p) for p in PERCENTILES)]
    return {
        f"{statistic}_{name}_ms": value for statistic, value in zip(statistics, values, strict=True)
    }


def percentile(data: Sequence[float], percent: float) -> float:
    """Of sorted data, linear between the two nearest values, as numpy has it."""
    place = (len(data) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(data) - 1)
    return data[low] + (data[high] - data[low]) * (place - low)


def format_summary(result: dict[str, Any]) -> str:
    """The table that the user sees."""
    lines = [
        f"{result['completed']} requests completed, {result['failed']} failed, "
        f"{result['not_sent']} not sent, in {result['duration']:.2f} s",
        *(f"  {number} × {kind}" for kind, number in result["failures"].items()),
        *(f"  {detail}" for detail in result["failure_details"]),
        "",
        f"{'requests/s':<24}{_show(result['request_throughput'], 2)}",
        f"{'output tokens/s':<24}{_show(result['output_throughput'], 1)}",
        f"{'total tokens/s':<24}{_show(result['total_token_throughput'], 1)}",
        f"{'prompt tokens':<24}{result['total_input_tokens']:>10}"
        + ("" if result["input_tokens_known"] else "  (not all answers carry usage)"),
        f"{'output tokens':<24}{result['total_output_tokens']:>10}"
        + _note_on_counts(result["output_tokens_from"]),
        "",
        f"{'ms':<24}" + "".join(f"{h:>10}" for h in ("mean", "p50", "p90", "p95", "p99")),
    ]
    for name, label in LATENCIES.items():
        cells = [f"mean_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES)]
        lines.append(f"{label:<24}" + "".join(_show(result[cell], 1) for cell in cells))
    lines += ["", f"{'client CPU share':<24}{_show(result['client_cpu_share'], 2)}  of one core"]
    return "\n".join(lines)


def _source_of_counts(done: Sequence[RequestRecord]) -> str:
    sources = {"usage" if record.is_counted_by_server else "chunks" for record in done}
    return " and ".join(sorted(sources, reverse=True)) or "usage"


def _note_on_counts(source: str) -> str:
    if source == "usage":
        return ""
    return f"  (counted from {source}: the server sends no usage; a chunk may hold several tokens)"


def _per_second(number: float, duration: float) -> float | None:
    return number / duration if duration > 0 else None


def _show(value: float | None, digits: int) -> str:
    return f"{'–':>10}" if value is None else f"{value:>10.{digits}f}"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Raises PagodaError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PagodaError(
            f"--output-json {path} cannot be written: {error.strerror}. Name another file."
        ) from error
