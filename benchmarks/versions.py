"""Two checkouts of Pagoda side by side: the same prompts, in turns, in one run.

Each side is a process of its own checkout's `.venv`, loaded once; the side that begins changes from
round to round. `make bench-versions OLD=FOLDER` runs it.

    python benchmarks/versions.py --old FOLDER --out FILE [--rounds 10] [--metrics decode_1 …]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import gemma_folder, require_model
from http_load import over_http
from report import Bar, Result, publish

# Higher is better for speeds, lower for times.
THROUGHPUT, TIME = Bar(at_least=0.97), Bar(at_most=1.03)
BARS = {
    "decode_1": THROUGHPUT,
    "decode_16": THROUGHPUT,
    "prefill_1000": THROUGHPUT,
    "http_16": THROUGHPUT,
    "prefix_hit_ttft": TIME,
    "http_16_p50_ttft": TIME,
    "http_16_p99_itl": TIME,
}
METRICS = ("decode_1", "decode_16", "prefill_1000", "prefix_hit_ttft", "http_16")
HTTP_FIGURES = {
    "http_16": "output_throughput",
    "http_16_p50_ttft": "p50_ttft_ms",
    "http_16_p99_itl": "p99_itl_ms",
}

Ask = Callable[[str, int], dict[str, float]]
"""(metric, round) → figures by metric."""


@contextlib.contextmanager
def side(python: Path, folder: Path, scratch: Path) -> Iterator[Ask]:
    """The engine and the server of one checkout, loaded."""
    worker = Path(__file__).with_name("versions_worker.py")
    with subprocess.Popen(
        [python, worker, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read() -> dict[str, Any]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"The side of {python} ended with {process.wait()}.")
            answer: dict[str, Any] = json.loads(line)
            return answer

        url = read()["url"]

        def ask(metric: str, number: int) -> dict[str, float]:
            if metric == "http_16":
                # One client for both: what differs is the server.
                report = over_http(url, number, scratch)
                return {name: float(report[key]) for name, key in HTTP_FIGURES.items()}
            assert process.stdin is not None
            print(json.dumps({"metric": metric, "number": number}), file=process.stdin, flush=True)
            return {metric: read()["value"]}

        try:
            yield ask
        finally:
            process.stdin.close()


def compare(sides: dict[str, Ask], rounds: int, metrics: Sequence[str]) -> list[Result]:
    """Medians of each side, and of the rounds' own ratios; round 0 warms up."""
    results = []
    for metric in metrics:
        figures: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds + 1):
            order = list(sides) if number % 2 else list(reversed(sides))
            found = {name: sides[name](metric, number) for name in order}
            shown = ", ".join(f"{name} {found[name][metric]:.2f}" for name in sides)
            print(f"  {metric}, {f'round {number}' if number else 'warm-up'}: {shown}", flush=True)
            if number:
                for name, values in found.items():
                    for figure, value in values.items():
                        figures.setdefault(figure, {}).setdefault(name, []).append(value)
        results += [_result(figure, values) for figure, values in figures.items()]
    return results


def _result(metric: str, values: dict[str, list[float]]) -> Result:
    ratios = [new / old for new, old in zip(values["new"], values["old"], strict=True)]
    return Result(
        metric=metric,
        value=median(values["new"]),
        unit="tokens/s" if BARS[metric] is THROUGHPUT else "ms",
        peer="the old checkout",
        peer_value=median(values["old"]),
        bar=BARS[metric],
        details={
            "median_of_ratios": round(median(ratios), 3),
            "new": [round(value, 2) for value in values["new"]],
            "old": [round(value, 2) for value in values["old"]],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout with its .venv")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=10, help="of each side; the median counts")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="only these")
    arguments = parser.parse_args()
    folder = require_model(gemma_folder())
    old_python = arguments.old / ".venv" / "bin" / "python"
    if not old_python.exists():
        raise SystemExit(f"{old_python} is missing. Run `make venv` in {arguments.old}.")
    with (
        tempfile.TemporaryDirectory() as scratch,
        side(old_python, folder, Path(scratch)) as old,
        side(Path(sys.executable), folder, Path(scratch)) as new,
    ):
        results = compare({"old": old, "new": new}, arguments.rounds, arguments.metrics)
    old_commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=arguments.old,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    publish("versions", results, arguments.out, rounds=arguments.rounds, old_commit=old_commit)


if __name__ == "__main__":
    main()
