"""Weights of 4 and 8 bits on a CPU: speed beside bf16 and llama.cpp, and the accuracy they cost.

Speed: new tokens at 1 to 16 requests, and prompts of 1,000 tokens, of random weights of
Qwen3-1.7B's shape, which are larger than the caches, and of Gemma 3 270M. All sides take turns.
llama.cpp has Q4_0 of the one and the file Q4_K_M of the other, the best of its settings for each
figure, and a process of its own; Pagoda serves the same file of Gemma.
Accuracy: Gemma's perplexity of the English text of Python's own help, cut into windows, and how
often the likeliest next token is the one that fp32 finds. `make bench-quantization` runs it.

    python benchmarks/quantization.py --out FILE [--rounds 5] [--shapes gemma-3-270m] [--windows 16]
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import llamacpp
import torch
from checkpoints import cache_folder, gemma_folder, make_qwen3_1_7b, require_model
from perplexity import agreement, score, windows_of_text
from report import Bar, Result, publish
from sides import Side, make_prompts, pagoda_side, timed
from turns import take_turns

from pagoda_runtime import LLM
from pagoda_runtime.platforms import machine

QWEN, GEMMA = "qwen3-1.7b", "gemma-3-270m"
WINDOW_TOKENS = 512
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
}
FILE, LLAMACPP = "gguf", "llamacpp"
PREFILL = "prefill_1000"
FIGURES: dict[str, tuple[int, int, int]] = {
    "1": (1, 8, 32),
    "8": (8, 8, 32),
    "16": (16, 8, 32),
    PREFILL: (1, 1000, 1),
}
"""Name → requests, tokens of each prompt, new tokens of each."""
BARS = {
    "int4_1": Bar(at_least=1.6),
    "int8_16": Bar(at_least=2.5),
    "int8_prefill_1000": Bar(at_least=3.0),
}
LLAMACPP_BARS = {
    "1": Bar(at_least=1.15),
    "8": Bar(at_least=1.5),
    "16": Bar(at_least=1.5),
    PREFILL: Bar(at_least=1.3),
}
TRIED = (256, 4)
"""Tokens of a prompt and new ones, at most, when llama.cpp's settings are tried."""
KV_CACHE_BYTES = 256 << 20


class Shape:
    """A model's sides, and their speeds."""

    def __init__(self, name: str, sides: dict[str, Side], vocab_size: int) -> None:
        self.name, self.sides, self.vocab_size = name, sides, vocab_size

    def seconds(self, side: Side, figure: str, number: int, limits: tuple[int, int]) -> float:
        """limits: of the tokens of a prompt, and of the new ones."""
        num_requests, *lengths = FIGURES[figure]
        num_prompt, num_output = map(min, lengths, limits)
        prompts = make_prompts(num_requests, num_prompt, self.vocab_size, figure, number)
        return timed(side, prompts, num_output)

    def speeds(self, figure: str, rounds: int, sides: dict[str, Side]) -> dict[str, float]:
        num_requests, prompt_tokens, output_tokens = FIGURES[figure]
        num_tokens = prompt_tokens if figure == PREFILL else num_requests * output_tokens

        def measure(side: Side, number: int) -> float:
            return num_tokens / self.seconds(side, figure, number, FIGURES[figure][1:])

        turns = {
            name: lambda number, side=side: measure(side, number) for name, side in sides.items()
        }
        return take_turns(f"{self.name}_{figure}", turns, rounds)

    def measure(self, rounds: int, llama: llamacpp.LlamaCpp | None) -> list[Result]:
        results = []
        for figure in FIGURES:
            sides, settings = dict(self.sides), {}
            if llama is not None:
                settings = llama.choose_settings(
                    lambda side, figure=figure: min(
                        self.seconds(side, figure, number, TRIED) for number in range(2)
                    )
                )
                sides[LLAMACPP] = llama.side(settings)
            results += self._compare(figure, self.speeds(figure, rounds, sides), settings)
        return results

    def _compare(
        self, figure: str, speeds: dict[str, float], settings: dict[str, int]
    ) -> list[Result]:
        unit = "prompt tokens/s" if figure == PREFILL else "tokens/s"
        results = [
            Result(
                f"{self.name}_{kind}_{figure}",
                speeds[kind],
                unit,
                "bf16",
                speeds["bf16"],
                BARS.get(f"{kind}_{figure}"),
            )
            for kind in self.sides
            if kind != "bf16"
        ]
        if LLAMACPP in speeds:
            # With weights as good as the file's.
            ours = FILE if FILE in self.sides else "int4"
            peer = "llama.cpp Q4_K_M" if ours == FILE else "llama.cpp Q4_0"
            name = f"{self.name}_{ours}_{figure}_vs_llamacpp"
            bar = LLAMACPP_BARS[figure]
            results.append(Result(name, speeds[ours], unit, peer, speeds[LLAMACPP], bar, settings))
        return results


def accuracy(
    folder: Path, kinds: dict[str, Any], llama: llamacpp.LlamaCpp | None, num_windows: int
) -> list[Result]:
    windows = windows_of_text(folder, num_windows, WINDOW_TOKENS)
    scores = {}
    flags_of = {"fp32": {"dtype": "float32"}, **kinds}
    for kind, flags in flags_of.items():
        with LLM(
            **{"model": str(folder), "dtype": "bfloat16", "max_model_len": 1024, **flags}
        ) as llm:
            scores[kind] = score(llm, windows)
        print(f"  {kind}: perplexity {scores[kind].perplexity:.4f}", flush=True)
    exact = scores["fp32"]
    results = []
    for kind in kinds:
        value, same = scores[kind].perplexity, agreement(scores[kind], exact)
        results.append(Result(f"perplexity_{kind}", value, "", "fp32", exact.perplexity))
        results.append(Result(f"same_likeliest_{kind}", same, "of tokens", "fp32", 1.0))
    if llama is not None:
        peer = llama.perplexity(windows)
        ours = scores[FILE].perplexity
        name, bar = "perplexity_gguf_vs_llamacpp", Bar(at_most=1.0)
        results.append(Result(name, ours, "", "llama.cpp Q4_K_M", peer, bar))
    return results


def llama_of(file: Path | None) -> contextlib.AbstractContextManager[llamacpp.LlamaCpp | None]:
    if file is None:
        return contextlib.nullcontext()
    return llamacpp.started(file, Path("out") / f"llamacpp-{file.stem}.log")


def compare(name: str, arguments: argparse.Namespace) -> list[Result]:
    has_llama = llamacpp.is_installed()
    if name == GEMMA:
        folder, kinds = require_model(gemma_folder()), {**KINDS, FILE: {}}
        kinds[FILE] = {"model": str(llamacpp.gemma_file())}
        file = llamacpp.gemma_file() if has_llama else None
    else:
        folder, kinds = make_qwen3_1_7b(cache_folder()), KINDS
        file = llamacpp.qwen_file() if has_llama else None
    results = []
    with llama_of(file) as llama:
        if name == GEMMA and arguments.windows:
            results += accuracy(folder, kinds, llama, arguments.windows)
        with contextlib.ExitStack() as stack:
            common = {"model": str(folder), "dtype": "bfloat16", "max_model_len": 1024}
            common["kv_cache_memory_bytes"] = KV_CACHE_BYTES
            llms = {
                kind: stack.enter_context(LLM(**{**common, **flags}))
                for kind, flags in kinds.items()
            }
            sides = {kind: pagoda_side(llm) for kind, llm in llms.items()}
            shape = Shape(name, sides, llms["bf16"].facts.vocab_size)
            results += shape.measure(arguments.rounds, llama)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=(QWEN, GEMMA), default=[QWEN, GEMMA])
    parser.add_argument("--windows", type=int, default=16, help="for the accuracy; 0: none")
    arguments = parser.parse_args()
    torch.set_num_threads(machine.allowed_cores())
    Path("out").mkdir(exist_ok=True)
    results = [result for name in arguments.shapes for result in compare(name, arguments)]
    publish(
        "quantization",
        results,
        arguments.out,
        windows=arguments.windows,
        window_tokens=WINDOW_TOKENS,
        rounds=arguments.rounds,
        figures=FIGURES,
        llamacpp=llamacpp.VERSION if llamacpp.is_installed() else None,
    )


if __name__ == "__main__":
    main()
