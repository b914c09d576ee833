"""Lengths like those of a recorded trace, from a small table of its quantiles.

The table keeps which answers belong to which prompts: for each tenth of the prompts, in order of
their length, it holds quantiles of the prompt's length and of the answer's.

    python benchmarks/trace_lengths.py TRACE TABLE     # makes the table of a trace
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from pagoda_runtime.bench.summary import percentile
from pagoda_runtime.bench.workloads.trace_file import TraceRow, read_trace

NUM_GROUPS = 10
NUM_QUANTILES = 50


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request's."""

    input_tokens: int
    output_tokens: int


def make_table(rows: list[TraceRow]) -> list[dict[str, list[int]]]:
    """For each group: quantiles of input_tokens and output_tokens, least first."""
    ordered = sorted(rows, key=lambda row: row.input_tokens)
    bounds = [len(ordered) * group // NUM_GROUPS for group in range(NUM_GROUPS + 1)]
    groups = [ordered[low:high] for low, high in itertools.pairwise(bounds)]
    return [
        {
            "input_tokens": _quantiles([row.input_tokens for row in group]),
            "output_tokens": _quantiles([row.output_tokens for row in group]),
        }
        for group in groups
    ]


def draw(table: list[dict[str, list[int]]], num_requests: int, seed: int) -> list[Lengths]:
    """Requests whose lengths are spread as in the trace."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(num_requests):
        group = rng.choice(table)
        lengths.append(
            Lengths(
                input_tokens=round(percentile(group["input_tokens"], 100 * rng.random())),
                output_tokens=round(percentile(group["output_tokens"], 100 * rng.random())),
            )
        )
    return lengths


def _quantiles(values: list[int]) -> list[int]:
    ordered = sorted(values)
    steps = range(NUM_QUANTILES + 1)
    return [round(percentile(ordered, 100 * step / NUM_QUANTILES)) for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("table", type=Path)
    arguments = parser.parse_args()
    rows = read_trace(arguments.trace)
    table = {
        "source": "Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv 2023 (CC-BY 4.0): "
        f"quantiles of the lengths of its {len(rows)} requests, not the requests themselves",
        "num_requests": len(rows),
        "groups": make_table(rows),
    }
    arguments.table.write_text(json.dumps(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
