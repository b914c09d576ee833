"""http_16: streaming over HTTP against the offline engine, with the same prompts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from report import Bar, Result
from server import serving
from sides import KV_CACHE_BYTES, Side, timed
from turns import take_turns

from pagoda_runtime.bench import serve as bench_serve

NUM_CONNECTIONS = 16
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 64


def measure_http(
    folder: Path, offline: Side, rounds: int, bar: Bar | None, scratch: Path
) -> Result:
    """Output tokens/s of a real server and a client process, beside the offline engine's."""
    client_reports: list[dict[str, Any]] = []

    flags = ("--dtype", "bfloat16", "--max-model-len", "2048")
    memory = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
    with serving(folder, *flags, *memory) as (url, _):

        def http_speed(number: int) -> float:
            client_reports.append(over_http(url, number, scratch))
            return float(client_reports[-1]["output_throughput"])

        def offline_speed(number: int) -> float:
            prompts = _prompts(url, number)
            return NUM_CONNECTIONS * OUTPUT_TOKENS / timed(offline, prompts, OUTPUT_TOKENS)

        speeds = take_turns("http_16", {"http": http_speed, "offline": offline_speed}, rounds)
    counted = client_reports[1:]
    return Result(
        metric="http_16",
        value=speeds["http"],
        unit="output tokens/s",
        peer="pagoda offline",
        peer_value=speeds["offline"],
        bar=bar,
        details={
            "client_cpu_share": round(median(r["client_cpu_share"] for r in counted), 3),
            "p50_ttft_ms": round(median(r["p50_ttft_ms"] for r in counted), 1),
            "p99_itl_ms": round(median(r["p99_itl_ms"] for r in counted), 1),
        },
    )


def over_http(url: str, number: int, scratch: Path) -> dict[str, Any]:
    """The report of a client process that sends the prompts of one round."""
    path = scratch / "http.json"
    command = [sys.executable, "-m", "pagoda_runtime", "bench", "serve"]
    subprocess.run(
        [*command, *_flags(url, number), "--output-json", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def _flags(url: str, number: int) -> list[str]:
    """Every round has prompts of its own, equal on both sides."""
    values = {
        "base-url": url,
        "num-prompts": NUM_CONNECTIONS,
        "max-concurrency": NUM_CONNECTIONS,
        "random-input-len": PROMPT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "num-warmups": 0,
        "seed": number,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _prompts(url: str, number: int) -> list[list[int]]:
    """What the client process sends."""
    parser = argparse.ArgumentParser()
    bench_serve.add_arguments(parser)
    planned = bench_serve.plan_run(parser.parse_args(_flags(url, number)))
    return [request.prompt_token_ids for request in planned.requests]
