"""What a grammar costs a decode step: 16 requests with one beside the same without, all logits
computed for both; and in processor time, which a busy machine does not spoil, what masks cost its
sampling. And 300 schemas made at random, answered by a server with random weights.

`make bench-grammar` runs all.

    python benchmarks/grammar.py --out FILE [--model FOLDER] [--rounds N] [--schemas N] [--busy]

With --busy steps are measured on one thread, in processor time, that of masks included. Without
rounds no steps are measured, without schemas none are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch
from checkpoints import gemma_folder, require_model
from decoding import NUM_REQUESTS, begin_decoding, load_core
from random_schemas import NUM_CHOICES, SchemaMaker, ask_for
from report import Bar, Result, publish
from server import serving
from turns import take_turns

from pagoda_runtime import SamplingParams
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.sampler import sample
from pagoda_runtime.execution.testing import make_row
from pagoda_runtime.grammar.compiler import Grammars
from pagoda_runtime.grammar.forms import json_grammar
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

NUM_STEPS = 60
# Both sides sample, so that all logits are computed for both, and go on to the last step.
SAMPLED = {"temperature": 1.0, "max_tokens": 500, "ignore_eos": True}
SCHEMAS = {
    # Long texts: most tokens are allowed at most steps.
    "texts": {"type": "array", "items": {"type": "string", "minLength": 200}, "minItems": 50},
    # Names, numbers and choices: few tokens are allowed at most steps.
    "records": {
        "type": "array",
        "minItems": 200,
        "items": {
            "type": "object",
            "properties": {
                "id": {"type": "integer", "minimum": 0, "maximum": 10**6},
                "kind": {"enum": ["apple", "banana", "cherry"]},
                "when": {"type": "string", "format": "date-time"},
                "price": {"type": "number"},
            },
            "required": ["id", "kind", "when", "price"],
            "additionalProperties": False,
        },
    },
}
# Of the tokens that masks allow, about as most masks of these schemas do.
SHARES = {"texts": 0.97, "records": 0.0001}


def measure(
    core: EngineCore, grammar: str | None, clock: Callable[[], float]
) -> Callable[[int], float]:
    """Milliseconds of the median decode step of a round."""

    def run(number: int) -> float:
        params = [
            SamplingParams(**SAMPLED, seed=seed, grammar=grammar) for seed in range(NUM_REQUESTS)
        ]
        begin_decoding(core, params, f"grammar {number}")
        seconds = []
        for _ in range(NUM_STEPS):
            begun = clock()
            core.step(time.time())
            seconds.append(clock() - begun)
            assert len(core.scheduler.running) == NUM_REQUESTS, "an answer ended"
        core.abort(list(core.scheduler.requests))
        return 1000 * median(seconds)

    return run


def measure_steps(folder: Path, rounds: int, *, is_busy: bool) -> list[Result]:
    clock = time.process_time if is_busy else time.perf_counter
    threads = 1 if is_busy else None
    core, _ = load_core(folder, async_scheduling=False, num_threads=threads)
    grammars = {"plain": None, **{name: json_grammar(SCHEMAS[name]) for name in SCHEMAS}}
    sides = {name: measure(core, text, clock) for name, text in grammars.items()}
    medians = take_turns("step of 16 requests", sides, rounds)
    return [
        Result(
            metric=f"masked_step_{name}",
            value=medians[name],
            unit="ms of processor time" if is_busy else "ms",
            peer="the same rows without a grammar",
            peer_value=medians["plain"],
            bar=Bar(at_most=1.1),
        )
        for name in SCHEMAS
    ]


def measure_sampling(vocab_size: int) -> list[Result]:
    """Milliseconds of one thread's processor time for the rows of a step."""
    torch.set_num_threads(1)
    logits, rng = torch.randn(NUM_REQUESTS, vocab_size).bfloat16(), np.random.default_rng(0)

    def make_mask(share: float) -> bytes:
        is_allowed = rng.random(32 * -(-vocab_size // 32)) < share
        return np.packbits(is_allowed, bitorder="little").tobytes()

    def time_rows(params: SamplingParams, share: float | None) -> Callable[[int], float]:
        rows = [
            make_row(params, seeds=[seed], mask=None if share is None else make_mask(share))
            for seed in range(NUM_REQUESTS)
        ]

        def run(number: int) -> float:
            begun = time.thread_time()
            sample(logits, rows)
            return 1000 * (time.thread_time() - begun)

        return run

    masked = {name: time_rows(SamplingParams(grammar=""), SHARES[name]) for name in SHARES}
    sides = {"plain": time_rows(SamplingParams(), None), **masked}
    medians = take_turns("sampling 16 rows", sides, 20)
    return [
        Result(
            metric=f"masked_sampling_{name}",
            value=medians[name],
            unit="ms of processor time",
            peer="the same rows without masks",
            peer_value=medians["plain"],
        )
        for name in masked
    ]


def measure_masks(folder: Path, config: ModelConfig) -> Result:
    """Microseconds of a mask, for one sequence, beside the model."""
    tokenizer = load_tokenizer(folder)
    grammars = Grammars(
        lambda: tokenizer, vocab_size=config.vocab_size, end_token_ids=config.eos_token_ids
    )
    rng, seconds, of_taking = np.random.default_rng(0), [], []
    for schema in SCHEMAS.values():
        matcher = grammars.compile(json_grammar(schema)).result().begin(ignore_eos=True)
        for _ in range(300):
            begun = time.perf_counter()
            (mask,) = grammars.start_masks([matcher])()
            seconds.append(time.perf_counter() - begun)
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
            token_id = int(rng.choice(np.flatnonzero(bits)))
            begun = time.perf_counter()
            matcher.take(token_id)
            of_taking.append(time.perf_counter() - begun)
    return Result(
        metric="mask",
        value=1e6 * median(seconds),
        unit="µs",
        peer="99 % of them at most",
        peer_value=1e6 * float(np.percentile(seconds, 99)),
        details={"take_us": round(1e6 * median(of_taking), 1)},
    )


def measure_schemas(count: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder) / "tiny")
        # So little memory that requests are preempted.
        flags = ("--max-num-seqs", "64", "--kv-cache-memory-bytes", "1500000")
        with serving(model, *flags) as (url, _):
            schemas = [SchemaMaker(seed).make() for seed in range(count)]
            begun = time.monotonic()
            tally = asyncio.run(ask_for(url, schemas, max_tokens=400))
            details: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
            metrics = httpx.get(f"{url}/metrics").text.splitlines()
    preemptions = next(line for line in metrics if line.startswith("vllm:num_preemptions_total"))
    details |= {"schemas": count, "answers": NUM_CHOICES * count, "cut": tally.num_cut}
    details |= {"schemas_without_a_finished_answer": len(tally.unfinished)}
    details |= {"refused": tally.refused, "wrong": tally.wrong}
    details |= {"preemptions": float(preemptions.split()[-1])}
    return Result(
        metric="finished_answers_that_fit",
        value=tally.num_valid,
        unit="answers",
        peer="finished",
        peer_value=tally.num_valid + len(tally.wrong),
        bar=Bar(at_least=1.0),
        details=details,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=gemma_folder())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--busy", action="store_true", help="other programs use the machine, too")
    arguments = parser.parse_args()
    require_model(arguments.model)
    results = []
    if arguments.schemas:
        results.append(measure_schemas(arguments.schemas))
    if arguments.rounds:
        results += measure_steps(arguments.model, arguments.rounds, is_busy=arguments.busy)
    config = load_model_config(arguments.model)
    results += [measure_masks(arguments.model, config), *measure_sampling(config.vocab_size)]
    publish("grammar", results, arguments.out, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
