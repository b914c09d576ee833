"""`pagoda bench latency` and `pagoda bench throughput`: the engine alone, without HTTP."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pagoda_runtime.bench.flags import add_number
from pagoda_runtime.bench.summary import percentile, write_json
from pagoda_runtime.bench.workloads import add_workload_flags, make_requests
from pagoda_runtime.bench.workloads.base import BenchRequest, random_token_ids
from pagoda_runtime.engine_flags import (
    add_cache_flags,
    add_engine_flags,
    add_model_flags,
    to_engine_config,
)
from pagoda_runtime.errors import FatalError
from pagoda_runtime.flags import integer
from pagoda_runtime.models.check import verify_start

if TYPE_CHECKING:
    from pagoda_runtime.client.llm import LLM

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_latency_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda bench latency`."""
    # The same prompts come back in every round.
    _add_llm_flags(parser, enable_prefix_caching=False)
    group = parser.add_argument_group("batch")
    for flag, default, text in (
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens to generate for each"),
        ("--batch-size", 8, "requests at once"),
        ("--num-iters-warmup", 2, "rounds before, that do not count"),
        ("--num-iters", 10, "rounds that count"),
    ):
        low = 0 if "warmup" in flag else 1
        add_number(group, flag, parse=integer(low), default=default, text=text)


def add_throughput_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda bench throughput`."""
    _add_llm_flags(parser)
    add_workload_flags(parser, num_prompts=100)


def _add_llm_flags(parser: argparse.ArgumentParser, **cache_defaults: Any) -> None:
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cache_flags(parser, **cache_defaults)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write all figures there")


def start_llm(args: argparse.Namespace) -> LLM:
    """The engine of the flags. Raises FatalError."""
    from pagoda_runtime import LLM

    named = {name for name in (args.model_argument, args.model) if name is not None}
    if len(named) != 1:
        raise FatalError(
            "InvalidFlags",
            f"{len(named) or 'no'} models are given; give one: pagoda bench {args.benchmark} "
            "MODEL, or --model MODEL.",
        )
    config = to_engine_config(args)
    verify_start(config)
    return LLM(**asdict(config))


def measure_latency(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one batch from the first to the last token, over several rounds."""
    rng = random.Random(args.seed)
    requests = [
        BenchRequest(random_token_ids(args.input_len, llm.facts.vocab_size, rng), args.output_len)
        for _ in range(args.batch_size)
    ]
    for _ in range(args.num_iters_warmup):
        _generate(llm, requests)
    latencies = [_generate(llm, requests)[0] for _ in range(args.num_iters)]
    return {
        "input_len": args.input_len,
        "output_len": args.output_len,
        "batch_size": args.batch_size,
        "avg_latency": fmean(latencies),
        "latencies": latencies,
        "percentiles": {
            str(percent): percentile(sorted(latencies), percent) for percent in LATENCY_PERCENTILES
        },
    }


def format_latency(result: dict[str, Any]) -> str:
    """One line per figure."""
    lines = [
        f"{result['batch_size']} requests at once, {result['input_len']} prompt tokens, "
        f"{result['output_len']} output tokens, {len(result['latencies'])} rounds",
        f"{'mean':<8}{result['avg_latency']:>10.3f} s",
        *(f"{'p' + p:<8}{value:>10.3f} s" for p, value in result["percentiles"].items()),
    ]
    return "\n".join(lines)


def measure_throughput(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Requests and tokens per second of a workload that is there all at once.

    Raises: RequestError: the workload's flags are wrong, or a request does not fit.
    """
    requests = make_requests(args, llm.facts.vocab_size, random.Random(args.seed))
    seconds, num_output = _generate(llm, requests)
    num_input = sum(len(request.prompt_token_ids) for request in requests)
    return {
        "dataset_name": args.dataset_name,
        "num_requests": len(requests),
        "elapsed_time": seconds,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(requests) / seconds,
        "output_tokens_per_second": num_output / seconds,
        "tokens_per_second": (num_input + num_output) / seconds,
    }


def format_throughput(result: dict[str, Any]) -> str:
    """One line per figure."""
    return "\n".join(
        [
            f"{result['num_requests']} requests, {result['total_input_tokens']} prompt tokens and "
            f"{result['total_output_tokens']} output tokens in {result['elapsed_time']:.2f} s",
            f"{'requests/s':<20}{result['requests_per_second']:>10.2f}",
            f"{'output tokens/s':<20}{result['output_tokens_per_second']:>10.1f}",
            f"{'total tokens/s':<20}{result['tokens_per_second']:>10.1f}",
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Run as the flags say; 0. Raises PagodaError."""
    is_latency = args.benchmark == "latency"
    with start_llm(args) as llm:
        measured = measure_latency(llm, args) if is_latency else measure_throughput(llm, args)
    print(format_latency(measured) if is_latency else format_throughput(measured))
    if args.output_json is not None:
        write_json(args.output_json, {"model": llm.config.model, **measured})
    return 0


def _generate(llm: LLM, requests: Sequence[BenchRequest]) -> tuple[float, int]:
    """(seconds, output tokens) of generating all requests at once."""
    from pagoda_runtime import SamplingParams

    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    params = [
        SamplingParams(temperature=0.0, max_tokens=request.output_len, ignore_eos=True)
        for request in requests
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)
