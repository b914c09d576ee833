"""Prompts that begin alike, as with system prompts: what a prefix cache saves."""

from __future__ import annotations

import argparse
import random

from pagoda_runtime.bench.flags import add_number
from pagoda_runtime.bench.workloads.base import BenchRequest, Workload, random_token_ids
from pagoda_runtime.bench.workloads.random_prompts import draw_length


def _add_flags(group: argparse._ArgumentGroup) -> None:
    for name, default, text in (
        ("prefix-len", 256, "tokens that prompts share"),
        ("suffix-len", 256, "tokens of its own that each prompt ends with"),
        ("num-prefixes", 10, "different prefixes, used in turn"),
    ):
        names = (f"--{name}", f"--prefix-repetition-{name}")
        add_number(group, *names, default=default, text=f"shared-prefix: {text}")


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
    "shared-prefix", "prompts that begin with one of a few prefixes", _add_flags, _make_requests
)
