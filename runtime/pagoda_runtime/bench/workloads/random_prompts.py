"""Random tokens that share nothing: every prompt is computed in full."""

from __future__ import annotations

import argparse
import random

from pagoda_runtime.bench.flags import add_number, range_ratio
from pagoda_runtime.bench.workloads.base import BenchRequest, Workload, random_token_ids


def _add_flags(group: argparse._ArgumentGroup) -> None:
    text = "random: tokens of a prompt"
    add_number(group, "--random-input-len", "--input-len", default=1024, text=text)
    text = "random, shared-prefix: tokens to generate for each"
    add_number(group, "--random-output-len", "--output-len", default=128, text=text)
    add_number(
        group,
        "--random-range-ratio",
        parse=range_ratio,
        default=0.0,
        metavar="R",
        text="random, shared-prefix: each of these lengths is drawn from length * (1 - R) to "
        "length * (1 + R); 0 to below 1",
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


RANDOM = Workload("random", "random tokens that share nothing", _add_flags, _make_requests)
