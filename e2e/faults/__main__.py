"""`make faults`: every fault, in at most forty minutes on two cores; the figures as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from faults import report
from faults.bench import Bench, Outcome, control_plane_in, make_bench
from faults.crashes import run_crashes
from faults.errors import run_errors, run_start_errors
from faults.outages import run_clock, run_outage, run_stability
from faults.scenarios import SCENARIOS
from faults.watches import run_watches

LONG_SECONDS = 600.0
Runs = tuple[list[Outcome], list[str]]


async def run_all(bench: Bench, parts: frozenset[str], partial: Path) -> dict[str, Any]:
    """The parts that mostly wait run beside the others."""
    found: dict[str, Any] = {}

    async def note(name: str, work: Callable[[], Awaitable[Any]]) -> None:
        if name not in parts:
            return
        started = time.monotonic()
        try:
            value = await work()
        except Exception as error:
            # One part that cannot go on is no reason to lose the others.
            traceback.print_exc()
            value = {"problems": [f"ended by {error!r}"]}
        seconds = round(time.monotonic() - started)
        found[name] = _summary(value) if isinstance(value, tuple) else value
        found[name]["seconds"] = seconds
        problems = len(found[name]["problems"])
        print(f"{name}: {seconds} s, {problems} problems", flush=True)
        # What there is so far is not lost with a bench that is ended.
        partial.write_text(json.dumps(found, indent=1))

    async def in_turn() -> None:
        await note("crashes", lambda: run_crashes(bench))
        await note("errors", lambda: run_errors(bench))
        await note("start", lambda: run_start_errors(bench))

    await bench.refer(SCENARIOS)
    print("without a fault: done", flush=True)
    await asyncio.gather(
        in_turn(),
        note("watches", lambda: run_watches(bench)),
        note("outage", lambda: run_outage(bench, LONG_SECONDS)),
        note("stability", lambda: run_stability(bench, LONG_SECONDS)),
        note("clock", lambda: run_clock(bench)),
    )
    return found


def _summary(runs: Runs) -> dict[str, Any]:
    outcomes, violations = runs
    summary: dict[str, Any] = {
        "runs": sum(it.is_reached for it in outcomes),
        "passed": sum(it.is_reached and not it.problems for it in outcomes),
        "in_time": sum(it.is_reached and not (it.problems or it.is_late) for it in outcomes),
        "left_out": sum(not it.is_run for it in outcomes),
        "table": report.table(outcomes),
        "problems": report.failures(outcomes),
    }
    summary["problems"] += [{"invariant": it} for it in violations]
    return summary


PARTS = ("crashes", "errors", "start", "watches", "outage", "stability", "clock")


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=38.0, help="after which no further run begins (38)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Connections that are cut on purpose leave tasks behind that nobody waits for.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # A user's PATH often lacks the folders where the administrator's programs are.
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        control_plane_in(Path(folder) / "plane") as paths,
    ):
        logs = Path(folder) / "logs"
        logs.mkdir()

        async def run() -> dict[str, Any]:
            async with make_bench(logs, Path(paths["kubeconfig"]), paths["helm"]) as bench:
                version = (await bench.api.request("GET", "/version"))["gitVersion"]
                head = report.circumstances(version)
                started = time.monotonic()
                bench.deadline = started + 60 * options.minutes
                found = await run_all(bench, frozenset(options.only), options.out)
                return {**head, "seconds": round(time.monotonic() - started), "results": found}

        found = asyncio.run(run())
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {options.out}.")
    return int(any(part["problems"] for part in found["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
