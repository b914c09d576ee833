"""What `make faults` writes: every run, and how many of each kind went well."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults.bench import Outcome

ROOT = Path(__file__).resolve().parents[2]


def table(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """For each scenario and fault: how many runs, how many went well, and how long they took.

    A run whose fault never came, since the operator needed fewer requests this time, is counted
    apart and proves nothing.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.scenario, outcome.fault), []).append(outcome)
    return [_row(names, group) for names, group in groups.items()]


def _row(names: tuple[str, ...], group: Sequence[Outcome]) -> dict[str, Any]:
    reached = [it for it in group if it.is_reached]
    seconds = [it.seconds for it in reached] or [0.0]
    return {
        **dict(zip(("scenario", "fault"), names, strict=True)),
        "runs": len(reached),
        "passed": sum(not it.problems for it in reached),
        "in_time": sum(not it.problems and not it.is_late for it in reached),
        "not_reached": sum(it.is_run and not it.is_reached for it in group),
        "left_out": sum(not it.is_run for it in group),
        "median_seconds": round(statistics.median(seconds), 2),
        "max_seconds": round(max(seconds), 2),
        "restarts": sum(it.restarts for it in reached),
    }


def failures(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [outcome.as_json() for outcome in outcomes if outcome.problems]


def circumstances(control_plane: str) -> dict[str, Any]:
    """When, where and with what."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    load = Path("/proc/loadavg").read_text().split()
    return {
        "name": "faults",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or "unknown",
        "machine": {
            "cpu": _cpu_name(),
            "threads": len(os.sched_getaffinity(0)),
            "load_before": float(load[0]),
        },
        "versions": {
            "python": platform.python_version(),
            "api_server": control_plane,
            **{name: version(name) for name in ("pagoda-serve", "kopf", "kubernetes", "aiohttp")},
        },
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
