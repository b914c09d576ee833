"""KV waste: how much of the blocks that requests hold is not filled.

The real scheduler and block pool run a trace's lengths, always with as many requests as fit; the
runner computes nothing. `make bench-waste` runs it.

    python benchmarks/waste.py --out FILE [--trace FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from report import Bar, Result, publish
from trace_lengths import Lengths, draw

from pagoda_runtime import SamplingParams
from pagoda_runtime.bench.workloads.trace_file import read_trace
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    EngineRequest,
    RowOutput,
    ScheduledRow,
)
from pagoda_runtime.testing import make_core

BLOCK_SIZE = 32
# The engine's defaults on a CPU; and blocks for what so many requests of this trace need.
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 512
LONG_PREFILL_TOKEN_THRESHOLD = 56
NUM_BLOCKS = 12_000
MAX_MODEL_LEN = 16_384
STEPS_PER_SAMPLE = 8
NUM_WAITING = 32
TABLE = Path(__file__).parent / "data" / "azure_2023_conv_lengths.json"


class IdleRunner:
    """Answers every row that samples with the same token."""

    ready_facts = EngineReady(
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        vocab_size=1 << 20,
        eos_token_ids=[],
        dtype="float32",
        kv_cache_dtype="float32",
        device="cpu",
        max_num_seqs=MAX_NUM_SEQS,
    )

    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        return [
            RowOutput(token_ids=[1] * len(row.seeds) if row.sampling_params else []) for row in rows
        ]


def make_request(number: int, lengths: Lengths) -> EngineRequest:
    return EngineRequest(
        request_id=str(number),
        # The first token differs, and with it the hashes of all blocks: nothing is shared.
        prompt_token_ids=[number, *range(lengths.input_tokens - 1)],
        sampling_params=SamplingParams(
            temperature=0.0, max_tokens=lengths.output_tokens, ignore_eos=True
        ),
        arrival_seconds=0.0,
    )


def run(core: EngineCore, trace: list[Lengths]) -> Counter[str]:
    """Sums over the samples: steps, running, held slots, those without keys and values."""
    scheduler, sums = core.scheduler, Counter[str]()
    next_request = num_steps = 0
    while next_request < len(trace) or core.has_work:
        while next_request < len(trace) and len(scheduler.waiting) < NUM_WAITING:
            core.add(make_request(next_request, trace[next_request]))
            next_request += 1
        core.step(0.0)
        num_steps += 1
        # Empty at the beginning and at the end, the engine shows nothing of interest.
        if num_steps % STEPS_PER_SAMPLE == 0 and scheduler.waiting and next_request > MAX_NUM_SEQS:
            held = scheduler.block_pool.num_used * BLOCK_SIZE
            sums["samples"] += 1
            sums["running"] += len(scheduler.running)
            sums["held"] += held
            sums["unfilled"] += held - sum(s.num_computed_tokens for s in scheduler.running)
    sums["preemptions"] = scheduler.preemptions_total
    return sums


def measure(name: str, token_budget: int, long_prefill: int, trace: list[Lengths]) -> list[Result]:
    core = make_core(
        IdleRunner(),
        max_num_batched_tokens=token_budget,
        long_prefill_token_threshold=long_prefill,
        max_num_waiting=NUM_WAITING,
    )
    started = time.monotonic()
    sums = run(core, trace)
    samples = sums["samples"]
    print(f"  {name}: {len(trace)} requests in {time.monotonic() - started:.0f} s", flush=True)
    details = {
        "samples": samples,
        "mean_running": round(sums["running"] / samples, 1),
        "preemptions": sums["preemptions"],
    }
    return [
        Result(
            f"kv_waste_{name}",
            sums["unfilled"] / samples,
            "slots",
            "slots of held blocks",
            sums["held"] / samples,
            bar=Bar(at_most=0.015),
            details={"counts": "slots of held blocks without keys and values", **details},
        ),
    ]


def load_lengths(arguments: argparse.Namespace) -> tuple[list[Lengths], str]:
    """(lengths, where they are from)."""
    if arguments.trace is not None:
        rows = read_trace(arguments.trace, arguments.num_requests)
        return [Lengths(row.input_tokens, row.output_tokens) for row in rows], "trace"
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    num_requests = arguments.num_requests or table["num_requests"]
    return draw(table["groups"], num_requests, seed=0), TABLE.name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--trace", type=Path, help="azure_2023_conv itself, in place of the table of its quantiles"
    )
    parser.add_argument("--num-requests", type=int, help="by default as many as the trace has")
    arguments = parser.parse_args()
    trace, source = load_lengths(arguments)
    results = [
        *measure("cpu", MAX_NUM_BATCHED_TOKENS, LONG_PREFILL_TOKEN_THRESHOLD, trace),
        *measure("gpu", 4 * MAX_NUM_BATCHED_TOKENS, 4 * MAX_NUM_BATCHED_TOKENS, trace),
    ]
    publish(
        "waste",
        results,
        arguments.out,
        lengths=source,
        num_requests=len(trace),
        block_size=BLOCK_SIZE,
    )


if __name__ == "__main__":
    main()
