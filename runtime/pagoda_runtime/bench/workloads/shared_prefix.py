"""Prompts that begin alike, as with system prompts: what a prefix cache saves."""

from __future__ import annotations

import argparse
import random

from pagoda_runtime.bench.workloads.base import BenchRequest, Workload, random_token_ids
from pagoda_runtime.bench.workloads.random_prompts import draw_length
from pagoda_runtime.flags import integer


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload shared-prefix")
    group.add_argument(
        "--prefix-len",
        "--prefix-repetition-prefix-len",
        type=integer(1),
        default=256,
        metavar="N",
        help="tokens that prompts share (%(default)s)",
    )
    group.add_argument(
        "--suffix-len",
        "--prefix-repetition-suffix-len",
        type=integer(1),
        default=256,
        metavar="N",
        help="tokens of its own that each prompt ends with (%(default)s)",
    )
    group.add_argument(
        "--num-prefixes",
        "--prefix-repetition-num-prefixes",
        type=integer(1),
        default=10,
        metavar="N",
        help="different prefixes, used in turn (%(default)s)",
    )


def _make_requests(
    args: argparse.Namespace, vocab_size: int, rng: random.Random
) -> list[BenchRequest]:
    prefixes = [
        random_token_ids(args.prefix_len, vocab_size, rng) for _ in range(args.num_prefixes)
    ]
    return [
        BenchRequest(
            prompt_token_ids=[
                *prefixes[number % len(prefixes)],
                *random_token_ids(args.suffix_len, vocab_size, rng),
            ],
            output_len=draw_length(args.random_output_len, args.random_range_ratio, rng),
        )
        for number in range(args.num_prompts)
    ]


SHARED_PREFIX = Workload(
    "shared-prefix", "prompts that begin with one of a few prefixes", _add_arguments, _make_requests
)
