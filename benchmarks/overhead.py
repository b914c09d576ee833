"""Where a decode step of 16 requests spends its time outside the model.

The engine's core runs the real model in this process; the phases around it are timed by wrapping
them. `make bench-overhead` runs it.

    python benchmarks/overhead.py --out FILE [--model FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from checkpoints import gemma_folder, require_model
from decoding import NUM_REQUESTS, begin_decoding, load_core
from report import Bar, Result, publish

from pagoda_runtime import SamplingParams
from pagoda_runtime.engine import core as engine_core
from pagoda_runtime.execution import sampler, steps

NUM_STEPS = 200
# What belongs to the model; all else of a step is overhead.
MODEL_PHASES = ("decoder", "vocabulary")


class Stopwatch:
    """Seconds by phase, of one step at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - started

        return timed


class TimedModel:
    """The decoder, its two parts timed."""

    def __init__(self, model: Any, watch: Stopwatch) -> None:
        self.config = model.config
        self.forward = watch.wrap("decoder", model)
        self.logits = watch.wrap("vocabulary", model.logits)
        self.argmax = watch.wrap("vocabulary", model.argmax)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


def measure(folder: Path) -> dict[str, list[float]]:
    """Seconds of each phase, step by step; "step" is the whole."""
    core, runner = load_core(folder)
    watch = Stopwatch()
    runner.model = TimedModel(runner.model, watch)
    core.scheduler.schedule = watch.wrap("schedule", core.scheduler.schedule)
    steps.prepare_step = watch.wrap("prepare", steps.prepare_step)
    sampler.sample = watch.wrap("sample", sampler.sample)
    engine_core.advance = watch.wrap("advance", engine_core.advance)
    encode = watch.wrap("encode", msgspec.msgpack.Encoder().encode)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS + 50, ignore_eos=True)
    begin_decoding(core, [params] * NUM_REQUESTS, "overhead")
    seconds_of: dict[str, list[float]] = defaultdict(list)
    for _ in range(NUM_STEPS):
        watch.seconds.clear()
        started = time.perf_counter()
        encode(core.step(0.0))
        seconds_of["step"].append(time.perf_counter() - started)
        for phase, seconds in watch.seconds.items():
            seconds_of[phase].append(seconds)
    return seconds_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=gemma_folder())
    arguments = parser.parse_args()
    require_model(arguments.model)
    measured = measure(arguments.model)
    in_model = [measured[phase] for phase in MODEL_PHASES]
    outside = [
        whole - sum(parts) for whole, *parts in zip(measured["step"], *in_model, strict=True)
    ]
    phases = {phase: round(1000 * median(seconds), 3) for phase, seconds in measured.items()}
    print("  " + ", ".join(f"{phase} {ms} ms" for phase, ms in phases.items()))
    result = Result(
        metric="step_overhead_16",
        value=1000 * median(outside),
        unit="ms",
        peer="allowed",
        peer_value=2.0,
        bar=Bar(at_most=1.0),
        details={"median_ms": phases, "steps": NUM_STEPS},
    )
    publish("overhead", [result], arguments.out)


if __name__ == "__main__":
    main()
