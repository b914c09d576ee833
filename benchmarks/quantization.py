"""Weights rounded when they are loaded, beside the checkpoint's own: accuracy and speed on a CPU.

Accuracy: the English text of Python's own help, cut into windows; the perplexity of its tokens, and
how often the likeliest next token is the one that fp32 finds. Speed: new tokens at 1 to 16
requests, in turns. `make bench-quantization` runs it.

    python benchmarks/quantization.py --out FILE [--model FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints import gemma_folder, require_model
from perplexity import agreement, score, windows_of_text
from report import Result, publish
from sides import make_prompts, pagoda_side, timed
from turns import take_turns

from pagoda_runtime import LLM

NUM_WINDOWS, WINDOW_TOKENS = 16, 512
NUM_ROWS = (1, 4, 16)
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64
KINDS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}


def accuracy(folder: Path) -> list[Result]:
    windows = windows_of_text(folder, NUM_WINDOWS, WINDOW_TOKENS)
    scores = {}
    for kind, flags in KINDS.items():
        with LLM(str(folder), max_model_len=1024, **flags) as llm:
            scores[kind] = score(llm, windows)
        print(f"  {kind}: perplexity {scores[kind].perplexity:.4f}", flush=True)
    exact = scores["fp32"]
    results = []
    for kind in ("bf16", "int8"):
        value, same = scores[kind].perplexity, agreement(scores[kind], exact)
        results.append(Result(f"perplexity_{kind}", value, "", "fp32", exact.perplexity))
        results.append(Result(f"same_likeliest_{kind}", same, "of tokens", "fp32", 1.0))
    return results


def speed(folder: Path, rounds: int) -> list[Result]:
    results = []
    with (
        LLM(str(folder), max_model_len=1024, **KINDS["bf16"]) as plain,
        LLM(str(folder), max_model_len=1024, **KINDS["int8"]) as rounded,
    ):
        sides = {"bf16": pagoda_side(plain), "int8": pagoda_side(rounded)}
        for num_rows in NUM_ROWS:

            def measure(kind: str, number: int, num_rows: int = num_rows) -> float:
                vocab_size = plain.facts.vocab_size
                prompts = make_prompts(num_rows, PROMPT_TOKENS, vocab_size, num_rows, number)
                return num_rows * OUTPUT_TOKENS / timed(sides[kind], prompts, OUTPUT_TOKENS)

            turns = {kind: lambda number, k=kind, m=measure: m(k, number) for kind in sides}
            speeds = take_turns(f"decode_{num_rows}", turns, rounds)
            results.append(
                Result(
                    f"decode_{num_rows}_int8", speeds["int8"], "tokens/s", "bf16", speeds["bf16"]
                )
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=gemma_folder())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    require_model(arguments.model)
    results = [*accuracy(arguments.model), *speed(arguments.model, arguments.rounds)]
    publish(
        "quantization",
        results,
        arguments.out,
        model=arguments.model.name,
        windows=NUM_WINDOWS,
        window_tokens=WINDOW_TOKENS,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
