"""Run every test that needs a GPU, on a machine that has one and no network.

    python -m gpu.check [--out FILE] [--seconds 500] [--rehearse]

Each file of tests has a process of its own, because an error on a GPU ends what else a process has
there. What fails or does not end is told with the rest. Without a GPU, --rehearse runs the same
engine tests on a CPU that is treated as a GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from gpu.machine import REHEARSAL, describe_run, report_path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# Tests of how much memory an engine takes want it for themselves.
ALONE = TESTS / "gpu" / "test_memory.py"
# Files of tests, on a machine with 16 cores.
AT_ONCE = 8
_LAST_LINES = 15


@dataclass(slots=True)
class Outcome:
    """Of one file of tests."""

    file: str
    seconds: float
    passed: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Test → why."""

    @property
    def is_good(self) -> bool:
        return not self.failures and self.passed > 0


def find_files(*, rehearses: bool) -> list[Path]:
    """Those with tests for a GPU; for a rehearsal those whose tests run on a CPU as well."""
    of_engines = sorted((TESTS / "gpu").glob("test_*.py"))
    if rehearses:
        return of_engines
    rooms = (TESTS / "kernels", TESTS / "runtime")
    paths = (path for room in rooms for path in room.rglob("test_*.py"))
    others = [path for path in paths if "mark.gpu" in path.read_text()]
    return [*of_engines, *sorted(others)]


def run_file(path: Path, marks: str, deadline: float, root: Path) -> Outcome:
    """Run the tests of one file that the marks choose, until the deadline at most."""
    started = time.monotonic()
    name = str(path.relative_to(root))
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "tests.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            marks,
            str(path),
            f"--junitxml={xml}",
        ]
        try:
            done = subprocess.run(
                command,
                cwd=root,
                env=os.environ | {"OMP_NUM_THREADS": "2"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(1.0, deadline - started),
                check=False,
            )
            output = f"{done.stdout}status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output = f"did not end in {error.timeout:.0f} s"
        outcome = Outcome(name, round(time.monotonic() - started, 1))
        if not xml.exists():
            outcome.failures[name] = "\n".join(output.splitlines()[-_LAST_LINES:])
            return outcome
        return read_results(xml, outcome)


def read_results(xml: Path, outcome: Outcome) -> Outcome:
    """Add what pytest has written."""
    for case in ElementTree.parse(xml).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        faults = [*case.iter("failure"), *case.iter("error")]
        if faults:
            outcome.failures[test] = faults[0].get("message", "")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def run_files(
    paths: Sequence[Path], marks: str, seconds: float, at_once: int, root: Path = ROOT
) -> list[Outcome]:
    """Several files at once: most of the time goes into compiling, on the host."""
    deadline = time.monotonic() + seconds
    together = [path for path in paths if path != ALONE]
    with ThreadPoolExecutor(at_once) as threads:
        outcomes = list(threads.map(lambda path: run_file(path, marks, deadline, root), together))
    alone = [run_file(path, marks, deadline, root) for path in paths if path == ALONE]
    return [*outcomes, *alone]


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """A line for each file, and one for each failure."""
    lines = []
    for outcome in outcomes:
        mark = "ok    " if outcome.is_good else "FAILED"
        lines.append(
            f"{mark} {outcome.file}: {outcome.passed} passed, {len(outcome.failures)} failed, "
            f"{outcome.skipped} skipped, {outcome.seconds:.0f} s"
        )
        lines += [f"       {test}: {why}" for test, why in outcome.failures.items()]
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    rehearses: bool = arguments.rehearse
    if not rehearses and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here. Give --rehearse to rehearse on the CPU.")
    path = report_path("gpu-check", arguments.out, rehearses=rehearses)
    report: dict[str, Any] = describe_run("gpu-check", rehearses=rehearses, commit=arguments.commit)
    marks = "not gpu" if rehearses else "gpu"
    files = find_files(rehearses=rehearses)
    outcomes = run_files(files, marks, arguments.seconds, 1 if rehearses else AT_ONCE)
    report["files"] = [asdict(outcome) for outcome in outcomes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if rehearses:
        print(REHEARSAL)
    print(f"{format_outcomes(outcomes)}\nWrote {path}.")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-check.json")
    parser.add_argument("--seconds", type=float, default=500.0, help="for all tests together")
    parser.add_argument("--commit", help="of a copy that is no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
