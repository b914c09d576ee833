"""Decode speed on a CPU: Pagoda's offline class against transformers' generate.

Both sides run in bf16 with the same threads on the same prompts, take turns round by round, and
are warmed up before; starting up does not count, prefill of the short prompts does.

    python benchmarks/cpu.py --out FILE [--model FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import Result, format_table, make_report, write_report

from pagoda_runtime import LLM, SamplingParams
from pagoda_runtime.execution import machine

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 16
BATCH_SIZES = (1, 16)

Side = Callable[[Sequence[list[int]]], int]
"""Generates OUTPUT_TOKENS for each prompt and returns how many tokens came out."""


def main() -> None:
    arguments = parse_arguments()
    if not (arguments.model / "config.json").exists():
        raise SystemExit(f"{arguments.model} is not a model folder. Run `make model` first.")
    torch.set_num_threads(machine.allowed_cores())
    started = time.monotonic()
    print(f"Loading {arguments.model} on both sides …", flush=True)
    theirs = transformers_side(arguments.model)
    # Without its prefix cache: the same prompts come back in every round.
    engine = LLM(
        str(arguments.model), dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False
    )
    try:
        ours = pagoda_side(engine)
        prompts = make_prompts(max(BATCH_SIZES), engine.facts.vocab_size)
        results = [
            compare(ours, theirs, prompts[:batch_size], arguments.rounds)
            for batch_size in BATCH_SIZES
        ]
    finally:
        engine.shutdown()
    print(format_table(results))
    report = make_report("cpu", results, ["pagoda-serve", "torch", "transformers"])
    write_report(report, arguments.out)
    print(f"Wrote {arguments.out} after {time.monotonic() - started:.0f} s.")


def parse_arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("PAGODA_CACHE", "~/.cache/pagoda")).expanduser()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=cache / "model" / "gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=5, help="of each side; the median counts")
    return parser.parse_args()


def make_prompts(num_prompts: int, vocab_size: int) -> list[list[int]]:
    """Random tokens: the speed does not depend on what they say, and any model can be measured."""
    rng = random.Random(0)
    return [
        [rng.randrange(100, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)
    ]


def pagoda_side(engine: LLM) -> Side:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)

    def generate(prompts: Sequence[list[int]]) -> int:
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def transformers_side(folder: Path) -> Side:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate(prompts: Sequence[list[int]]) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return int(output[:, ids.shape[1] :].numel())

    return generate


def compare(ours: Side, theirs: Side, prompts: list[list[int]], rounds: int) -> Result:
    """Medians over rounds in which both sides take turns."""
    sides = (ours, theirs)
    for side in sides:
        tokens_per_second(side, prompts)
    speeds = [[tokens_per_second(side, prompts) for side in sides] for _ in range(rounds)]
    for number, (our_speed, their_speed) in enumerate(speeds, start=1):
        print(
            f"  batch {len(prompts)}, round {number}: "
            f"pagoda {our_speed:.1f}, transformers {their_speed:.1f} tokens/s",
            flush=True,
        )
    our_speeds, their_speeds = zip(*speeds, strict=True)
    return Result(
        metric=f"decode_{len(prompts)}",
        value=median(our_speeds),
        unit="output tokens/s",
        peer="transformers generate",
        peer_value=median(their_speeds),
    )


def tokens_per_second(side: Side, prompts: Sequence[list[int]]) -> float:
    started = time.perf_counter()
    num_tokens = side(prompts)
    seconds = time.perf_counter() - started
    assert num_tokens == len(prompts) * OUTPUT_TOKENS, num_tokens
    return num_tokens / seconds


if __name__ == "__main__":
    main()
