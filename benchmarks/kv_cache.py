"""Keys and values of 8 bits beside bf16's: accuracy, and the speed of decode attention on a CPU.

Accuracy: perplexity of the English text of Python's own help, and how often the likeliest next
token is the one that is found with keys and values in bf16. Speed: attention of one layer, 16 rows
of 4096 tokens each, all dtypes in turns; what counts is the median of the rounds' own ratios.
`make bench-kv-cache` runs it.

    python benchmarks/kv_cache.py --out FILE [--model FOLDER] [--rounds 20]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from checkpoints import gemma_folder, require_model
from perplexity import Score, agreement, score, windows_of_text
from report import Bar, Result, publish

from pagoda_kernels.paged_attention import AttentionSpec, make_backend
from pagoda_kernels.paged_attention.testing import no_rotation
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_runtime import LLM

NUM_WINDOWS, WINDOW_TOKENS = 20, 1024
KINDS = ("fp8_e4m3", "fp8_e5m2", "int8")
KV_DTYPES = {
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
# Of e5m2, with two bits behind the point, nothing is asked.
PERPLEXITY = {"fp8_e4m3": Bar(at_most=1.01), "int8": Bar(at_most=1.01)}
NO_SLOWER = Bar(at_most=1.0)
NUM_ROWS, CONTEXT, BLOCK_SIZE = 16, 4096, 32
SHAPES = {"head_dim_128": (32, 8, 128), "head_dim_256": (8, 2, 256)}
"""num_heads, num_kv_heads, head_dim."""


def accuracy(folder: Path) -> list[Result]:
    windows = windows_of_text(folder, NUM_WINDOWS, WINDOW_TOKENS)
    scores: dict[str, Score] = {}
    for kind in ("auto", *KINDS):
        with LLM(str(folder), dtype="bfloat16", max_model_len=2048, kv_cache_dtype=kind) as llm:
            scores[kind] = score(llm, windows)
        print(f"  {kind}: perplexity {scores[kind].perplexity:.4f}", flush=True)
    exact, results = scores["auto"], []
    for kind in KINDS:
        value, same, bar = scores[kind].perplexity, agreement(scores[kind], exact), PERPLEXITY
        found = Result(f"perplexity_{kind}", value, "", "bf16", exact.perplexity, bar.get(kind))
        results.append(found)
        results.append(Result(f"same_likeliest_{kind}", same, "of tokens", "bf16", 1.0))
    return results


def make_attention(shape: tuple[int, int, int], kv_dtype: torch.dtype) -> Callable[[], float]:
    """A function that attends once, and returns the milliseconds."""
    num_heads, num_kv_heads, head_dim = shape
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        windows=(0,),
        scale=head_dim**-0.5,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    backend = make_backend(spec)
    num_blocks = NUM_ROWS * CONTEXT // BLOCK_SIZE
    backend.allocate(num_blocks + 1)
    order = np.random.default_rng(0).permutation(num_blocks) + 1
    table = order.astype(np.int32).reshape(NUM_ROWS, -1)
    # Memory that nobody wrote would not be there, but one page of zeros in its place.
    for slots in torch.arange(BLOCK_SIZE, (num_blocks + 1) * BLOCK_SIZE).split(CONTEXT):
        heads = torch.randn(CONTEXT, num_heads + 2 * num_kv_heads, head_dim).bfloat16()
        rotate_and_store(heads, *no_rotation(CONTEXT, head_dim), backend.kv_caches[0], slots)
    ones, lens = np.ones(NUM_ROWS, dtype=np.int64), np.full(NUM_ROWS, CONTEXT)
    plan, rotary = backend.plan(ones, lens, table), no_rotation(NUM_ROWS, head_dim)
    qkv = torch.randn(NUM_ROWS, spec.qkv_size).bfloat16()

    def attend() -> float:
        rows = qkv.clone()
        started = time.perf_counter()
        plan.attend(0, rows, rotary)
        return 1e3 * (time.perf_counter() - started)

    return attend


def speed(rounds: int) -> list[Result]:
    results = []
    for name, shape in SHAPES.items():
        sides = {kind: make_attention(shape, kv_dtype) for kind, kv_dtype in KV_DTYPES.items()}
        times: dict[str, list[float]] = {kind: [] for kind in sides}
        for number in range(rounds + 1):
            # The side that begins changes, and round 0 warms up.
            for kind in list(sides)[:: 1 if number % 2 else -1]:
                milliseconds = sides[kind]()
                if number:
                    times[kind].append(milliseconds)
        for kind in KINDS:
            pairs = zip(times[kind], times["bf16"], strict=True)
            ratio = median(one / other for one, other in pairs)
            milliseconds = {side: round(median(times[side]), 2) for side in (kind, "bf16")}
            print(f"  {name}, {kind}: {ratio:.3f} of bf16's time", flush=True)
            results.append(
                Result(
                    f"decode_{name}_{kind}",
                    ratio,
                    "of the time",
                    "bf16",
                    1.0,
                    NO_SLOWER,
                    {"median_milliseconds": milliseconds},
                )
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=gemma_folder())
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    require_model(arguments.model)
    publish(
        "kv-cache",
        [*accuracy(arguments.model), *speed(arguments.rounds)],
        arguments.out,
        model=arguments.model.name,
        windows=NUM_WINDOWS,
        window_tokens=WINDOW_TOKENS,
        rows=NUM_ROWS,
        context_tokens=CONTEXT,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
