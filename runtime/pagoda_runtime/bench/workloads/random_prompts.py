"""Random tokens that share nothing: every prompt is computed in full."""

from __future__ import annotations

import argparse
import random

from pagoda_runtime.bench.flags import range_ratio
from pagoda_runtime.bench.workloads.base import BenchRequest, Workload, random_token_ids
from pagoda_runtime.flags import integer


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload random (output length: shared-prefix too)")
    group.add_argument(
        "--random-input-len",
        "--input-len",
        type=integer(1),
        default=1024,
        metavar="N",
        help="tokens of a prompt (%(default)s)",
    )
    group.add_argument(
        "--random-output-len",
        "--output-len",
        type=integer(1),
        default=128,
        metavar="N",
        help="tokens to generate for each (%(default)s)",
    )
    group.add_argument(
        "--random-range-ratio",
        type=range_ratio,
        default=0.0,
        metavar="R",
        help="both lengths are drawn from length * (1 - R) to length * (1 + R); 0 to below 1 "
        "(%(default)s)",
    )


def draw_length(length: int, ratio: float, rng: random.Random) -> int:
    """Uniform from length * (1 - ratio) to length * (1 + ratio), at least 1."""
    return max(1, rng.randint(int(length * (1 - ratio)), int(length * (1 + ratio))))


def _make_requests(
    args: argparse.Namespace, vocab_size: int, rng: random.Random
) -> list[BenchRequest]:
    ratio = args.random_range_ratio
    return [
        BenchRequest(
            prompt_token_ids=random_token_ids(
                draw_length(args.random_input_len, ratio, rng), vocab_size, rng
            ),
            output_len=draw_length(args.random_output_len, ratio, rng),
        )
        for _ in range(args.num_prompts)
    ]


RANDOM = Workload("random", "random tokens that share nothing", _add_arguments, _make_requests)
