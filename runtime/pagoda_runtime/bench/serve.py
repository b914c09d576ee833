"""`pagoda bench serve`: load on any OpenAI-compatible server, and how it answers."""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from pagoda_runtime.bench.client import HttpClient
from pagoda_runtime.bench.endpoint import (
    ENDPOINTS,
    BodyOptions,
    Endpoint,
    encode_body,
    measure,
)
from pagoda_runtime.bench.flags import add_number, positive_number, temperature
from pagoda_runtime.bench.load import make_arrivals, run_load
from pagoda_runtime.bench.server import add_server_flags, find_model, make_client
from pagoda_runtime.bench.summary import format_summary, summarize, write_json
from pagoda_runtime.bench.workloads import add_workload_flags, make_requests
from pagoda_runtime.bench.workloads.base import BenchRequest
from pagoda_runtime.errors import RequestError
from pagoda_runtime.flags import integer, positive_seconds
from pagoda_runtime.sampling_params import MAX_SEED

# Every vocabulary in use is larger.
DEFAULT_VOCAB_SIZE = 10_000


def endpoint(text: str) -> Endpoint:
    """A type for argparse: completions or chat, or their paths as vLLM's users write them."""
    for known in ENDPOINTS.values():
        if text in (known.name, known.path):
            return known
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(ENDPOINTS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda bench serve`."""
    _add_server_flags(parser)
    _add_request_flags(parser)
    _add_load_flags(parser)
    add_workload_flags(parser, num_prompts=100)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write all figures there")


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add_server_flags(group)
    group.add_argument(
        "--endpoint",
        type=endpoint,
        default=ENDPOINTS["completions"],
        metavar="{completions,chat}",
        help="which of the two streaming APIs is called (completions)",
    )
    add_number(
        group,
        "--timeout-seconds",
        parse=positive_seconds,
        default=600.0,
        metavar="S",
        text="after which a request counts as failed",
    )


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--prompt-format",
        choices=("ids", "text"),
        default="ids",
        help="ids: token ids, which completions of vLLM and Pagoda take; text: common words, about "
        "as many tokens; chat is always text (%(default)s)",
    )
    text = "random token ids stay below N"
    add_number(group, "--vocab-size", parse=integer(2), default=DEFAULT_VOCAB_SIZE, text=text)
    add_number(
        group, "--temperature", parse=temperature, default=0.0, metavar="T", text="of the sampling"
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send ignore_eos, so that each answer has its full length (on)",
    )


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    add_number(
        group,
        "--request-rate",
        parse=positive_number,
        metavar="R",
        text="open loop: requests per second, whether or not the server keeps up "
        "(inf: all at once; of a trace, its own arrivals)",
    )
    add_number(
        group,
        "--burstiness",
        parse=positive_number,
        default=1.0,
        metavar="B",
        text="of the arrivals at --request-rate: 1 Poisson, less is burstier, inf constant",
    )
    text = "closed loop: at most C requests at once (no bound)"
    add_number(group, "--max-concurrency", metavar="C", text=text)
    text = "requests sent before, one after the other, that do not count"
    add_number(group, "--num-warmups", parse=integer(0), default=1, text=text)
    text = "of prompts, lengths and arrivals: equal seeds, equal runs"
    add_number(group, "--seed", parse=integer(0, MAX_SEED), default=0, text=text)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready to start."""

    warmups: list[BenchRequest]
    requests: list[BenchRequest]
    arrivals: list[float]
    """Seconds from the start at which each request is sent."""


def plan_run(args: argparse.Namespace) -> Run:
    """Prompts and arrivals, from the seed. Raises RequestError."""
    rng = random.Random(args.seed)
    requests = make_requests(args, args.vocab_size, rng)
    # Other prompts than those that count, which would be found in the prefix cache.
    warmups = make_requests(
        argparse.Namespace(**{**vars(args), "num_prompts": args.num_warmups}),
        args.vocab_size,
        random.Random(args.seed + 1),
    )
    recorded = [r.arrival_seconds for r in requests if r.arrival_seconds is not None]
    if args.request_rate is None and len(recorded) == len(requests):
        return Run(warmups, requests, recorded)
    rate = math.inf if args.request_rate is None else args.request_rate
    arrivals = make_arrivals(len(requests), request_rate=rate, burstiness=args.burstiness, rng=rng)
    return Run(warmups, requests, arrivals)


def run(args: argparse.Namespace) -> int:
    """Run as the flags say; 0 if every request was completed, else 1. Raises PagodaError."""
    client = make_client(args)
    planned = plan_run(args)
    result = uvloop.run(_run_against(args, planned, client))
    print(format_summary(result))
    if args.output_json is not None:
        write_json(args.output_json, result)
    return 0 if result["completed"] == len(planned.requests) else 1


async def _run_against(
    args: argparse.Namespace, planned: Run, client: HttpClient
) -> dict[str, Any]:
    try:
        model = await find_model(client, args)
        options = BodyOptions(
            model=model,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
            prompt_as_text=args.prompt_format == "text",
        )
        path = args.endpoint.path
        for request in planned.warmups:
            body = encode_body(args.endpoint, request, options)
            await _warm_up(client, path, body, args.timeout_seconds)
        bodies = [encode_body(args.endpoint, request, options) for request in planned.requests]
        print(f"Sending {len(bodies)} requests to {args.base_url}{path} …", flush=True)
        cpu_before, started = time.process_time(), time.perf_counter()
        records = await run_load(
            bodies,
            planned.arrivals,
            lambda body: measure(client, path, body, timeout_seconds=args.timeout_seconds),
            max_concurrency=args.max_concurrency,
        )
        cpu_share = (time.process_time() - cpu_before) / (time.perf_counter() - started)
    finally:
        await client.close()
    return {
        **_describe_run(args, model),
        **summarize(records, num_unsent=len(bodies) - len(records)),
        "client_cpu_share": cpu_share,
    }


async def _warm_up(client: HttpClient, path: str, body: bytes, timeout_seconds: float) -> None:
    """Raises RequestError: a request that fails alone would fail in the run too."""
    record = await measure(client, path, body, timeout_seconds=timeout_seconds)
    if record.failure is not None:
        raise RequestError(
            f"The first request to {path} failed, so nothing was measured: {record.failure}: "
            f"{record.detail} Correct the flags (--model, --endpoint, --vocab-size, "
            "--prompt-format, --no-ignore-eos or the lengths), or the server."
        )


def _describe_run(args: argparse.Namespace, model: str) -> dict[str, Any]:
    rate = args.request_rate
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_url": args.base_url,
        "endpoint": args.endpoint.path,
        "model_id": model,
        "dataset_name": args.dataset_name,
        "num_prompts": args.num_prompts,
        # JSON knows no infinity.
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
        "burstiness": "inf" if math.isinf(args.burstiness) else args.burstiness,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
    }
