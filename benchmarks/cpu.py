"""The engine's speed on a CPU, against transformers on the same machine and prompts.

All sides run in bf16 with the same threads and take turns round by round; every round has new
prompts, the same for all sides. Starting up does not count. `make bench-cpu` runs it.

    python benchmarks/cpu.py --out FILE [--shape gemma-3-270m|qwen3-1.7b] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import roofline
import torch
from checkpoints import cache_folder, gemma_folder, make_qwen3_1_7b, require_model
from http_load import measure_http
from report import Bar, Result, publish
from sides import (
    KV_CACHE_BYTES,
    Side,
    continuous_batching_side,
    generate_side,
    load_transformers,
    make_prompts,
    pagoda_side,
    timed,
)
from turns import take_turns

from pagoda_runtime import LLM
from pagoda_runtime.platforms import machine

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 16
LONG_PROMPT_TOKENS = 1000
SHARED_TOKENS = 960
BARS = {
    "decode_1": Bar(at_least=1.5),
    "decode_16": Bar(at_least=2.8),
    "decode_16_cb": Bar(at_least=3.0),
    "prefill_1000": Bar(at_least=1.2),
    "prefix_hit_ttft": Bar(at_most=0.15),
    "http_16": Bar(at_least=0.85),
    "roofline_1": Bar(at_least=0.75),
}
GENERATE, BATCHING, PAGODA = "transformers generate", "transformers batching", "pagoda"


class Benchmark:
    """The metrics of one model; those that are not asked for are left out."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, llm: LLM) -> None:
        self.folder = folder
        self.rounds: int = arguments.rounds
        self.metrics: list[str] = arguments.metrics
        self.bars = BARS if arguments.shape == "gemma-3-270m" else {}
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.vocab_size = llm.facts.vocab_size
        self.ours = pagoda_side(llm)

    def run(self) -> list[Result]:
        """Every metric, with its bar where the model has one."""
        results = [*self._against_transformers(), *self._prefix_hit(), *self._roofline()]
        if "http_16" in self.metrics:
            with tempfile.TemporaryDirectory() as scratch:
                bar = self.bars.get("http_16")
                results.append(
                    measure_http(self.folder, self.ours, self.rounds, bar, Path(scratch))
                )
        return results

    def _against_transformers(self) -> list[Result]:
        wanted = {"decode_1", "decode_16", "decode_16_cb", "prefill_1000"} & set(self.metrics)
        if not wanted:
            return []
        # Not kept: the server needs the memory later.
        model = load_transformers(self.folder)
        generate = generate_side(model)
        results = []
        if "decode_1" in wanted:
            speeds = self._decode(1, {PAGODA: self.ours, GENERATE: generate})
            results.append(self._speed("decode_1", speeds, GENERATE))
        if {"decode_16", "decode_16_cb"} & wanted:
            with continuous_batching_side(model) as batching:
                sides = {PAGODA: self.ours, GENERATE: generate, BATCHING: batching}
                speeds = self._decode(16, sides)
            results.append(self._speed("decode_16", speeds, GENERATE))
            results.append(self._speed("decode_16_cb", speeds, BATCHING))
        if "prefill_1000" in wanted:
            speeds = self._prefill({PAGODA: self.ours, GENERATE: generate})
            results.append(self._speed("prefill_1000", speeds, GENERATE, "prompt tokens/s"))
        return results

    def _decode(self, batch_size: int, sides: dict[str, Side]) -> dict[str, float]:
        def measure(side: Side, number: int) -> float:
            prompts = self._prompts(batch_size, PROMPT_TOKENS, "decode", batch_size, number)
            return batch_size * OUTPUT_TOKENS / timed(side, prompts, OUTPUT_TOKENS)

        return take_turns(f"decode_{batch_size}", _bind(measure, sides), self.rounds)

    def _prefill(self, sides: dict[str, Side]) -> dict[str, float]:
        def measure(side: Side, number: int) -> float:
            prompts = self._prompts(1, LONG_PROMPT_TOKENS, "prefill", number)
            return LONG_PROMPT_TOKENS / timed(side, prompts, 1)

        return take_turns("prefill_1000", _bind(measure, sides), self.rounds)

    def _prefix_hit(self) -> list[Result]:
        """Milliseconds to the first token, which here is all there is to generate."""
        if "prefix_hit_ttft" not in self.metrics:
            return []

        def measure(ending: str, number: int) -> float:
            (prefix,) = self._prompts(1, SHARED_TOKENS, "prefix", number)
            (suffix,) = self._prompts(1, LONG_PROMPT_TOKENS - SHARED_TOKENS, ending, number)
            return 1000 * timed(self.ours, [[*prefix, *suffix]], 1)

        # The cold one comes first in each round, and leaves the prefix in the cache.
        seconds = take_turns(
            "prefix_hit_ttft", _bind(measure, {"cold": "a", "hit": "b"}), self.rounds
        )
        return [
            Result(
                metric="prefix_hit_ttft",
                value=seconds["hit"],
                unit="ms",
                peer="without a hit",
                peer_value=seconds["cold"],
                bar=self.bars.get("prefix_hit_ttft"),
            )
        ]

    def _roofline(self) -> list[Result]:
        if "roofline_1" not in self.metrics:
            return []
        num_bytes = roofline.weight_bytes_of_step(self.folder, self.config)

        def decode(number: int) -> float:
            prompts = self._prompts(1, PROMPT_TOKENS, "roofline", number)
            return OUTPUT_TOKENS / timed(self.ours, prompts, OUTPUT_TOKENS)

        figures = take_turns(
            "roofline_1",
            {
                "decode, tokens/s": decode,
                "sum, GB/s": lambda _: roofline.sum_bandwidth() / 1e9,
                "vocabulary, GB/s": lambda _: roofline.vocabulary_bandwidth(self.config) / 1e9,
            },
            self.rounds,
        )
        bandwidth = max(figures["sum, GB/s"], figures["vocabulary, GB/s"])
        return [
            Result(
                metric="roofline_1",
                value=figures["decode, tokens/s"],
                unit="output tokens/s",
                peer="bandwidth ÷ weight bytes",
                peer_value=bandwidth * 1e9 / num_bytes,
                bar=self.bars.get("roofline_1"),
                details={
                    "weight_bytes": num_bytes,
                    "sum_gbps": round(figures["sum, GB/s"], 1),
                    "vocabulary_gbps": round(figures["vocabulary, GB/s"], 1),
                },
            )
        ]

    def _speed(
        self, metric: str, speeds: dict[str, float], peer: str, unit: str = "output tokens/s"
    ) -> Result:
        return Result(metric, speeds[PAGODA], unit, peer, speeds[peer], bar=self.bars.get(metric))

    def _prompts(self, num_prompts: int, num_tokens: int, *seed: object) -> list[list[int]]:
        return make_prompts(num_prompts, num_tokens, self.vocab_size, *seed)


def _bind(measure: Any, sides: dict[str, Any]) -> dict[str, Any]:
    """name → measure(side, round number) of the round number alone."""
    return {name: lambda number, side=side: measure(side, number) for name, side in sides.items()}


def main() -> None:
    arguments = parse_arguments()
    folder = find_model(arguments)
    torch.set_num_threads(machine.allowed_cores())
    started = time.monotonic()
    with LLM(
        str(folder), dtype="bfloat16", max_model_len=2048, kv_cache_memory_bytes=KV_CACHE_BYTES
    ) as llm:
        results = Benchmark(arguments, folder, llm).run()
    print(f"{len(results)} metrics of {folder.name} in {time.monotonic() - started:.0f} s")
    publish(f"cpu-{arguments.shape}", results, arguments.out, rounds=arguments.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="of each side; the median counts")
    parser.add_argument(
        "--shape",
        choices=("gemma-3-270m", "qwen3-1.7b"),
        default="gemma-3-270m",
        help="gemma-3-270m: the real model, with bars; qwen3-1.7b: random weights of its shape",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=tuple(BARS), default=list(BARS), help="only these"
    )
    return parser.parse_args()


def find_model(arguments: argparse.Namespace) -> Path:
    if arguments.shape == "qwen3-1.7b":
        return make_qwen3_1_7b(cache_folder())
    return require_model(gemma_folder())


if __name__ == "__main__":
    main()
