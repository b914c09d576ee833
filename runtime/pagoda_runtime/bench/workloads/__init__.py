"""The workloads of the benchmarks: one file each, one row here."""

from __future__ import annotations

import argparse
import random

from pagoda_runtime.bench.flags import add_number
from pagoda_runtime.bench.workloads.base import BenchRequest, Workload
from pagoda_runtime.bench.workloads.random_prompts import RANDOM
from pagoda_runtime.bench.workloads.shared_prefix import SHARED_PREFIX
from pagoda_runtime.bench.workloads.trace_file import TRACE_FILE

WORKLOADS: dict[str, Workload] = {
    workload.name: workload for workload in (RANDOM, SHARED_PREFIX, TRACE_FILE)
}


def add_workload_flags(parser: argparse.ArgumentParser, *, num_prompts: int) -> None:
    """Add the choice of the workload and the flags of each; `num_prompts` is the default."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--dataset-name",
        choices=tuple(WORKLOADS),
        default="random",
        help="; ".join(f"{w.name}: {w.help}" for w in WORKLOADS.values()) + " (%(default)s)",
    )
    text = "requests of the run; of a trace, its first N"
    add_number(group, "--num-prompts", default=num_prompts, text=text)
    for workload in WORKLOADS.values():
        workload.add_flags(group)


def make_requests(
    args: argparse.Namespace, vocab_size: int, rng: random.Random
) -> list[BenchRequest]:
    """The requests that the flags describe. Raises RequestError."""
    return WORKLOADS[args.dataset_name].make_requests(args, vocab_size, rng)
