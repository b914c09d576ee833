"""What every benchmark writes: a table on the screen and one JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pagoda_runtime.platforms import machine


@dataclass(frozen=True, slots=True)
class Bar:
    """What a ratio must reach."""

    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, ratio: float) -> bool:
        if self.at_least is not None and ratio < self.at_least:
            return False
        return self.at_most is None or ratio <= self.at_most

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of ours beside another one; the bar is for their ratio."""

    metric: str
    value: float
    unit: str
    peer: str
    """What peer_value is: another program's figure, or one of ours to compare with."""
    peer_value: float
    bar: Bar | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.value / self.peer_value

    @property
    def verdict(self) -> str:
        """The bar and whether it is met; empty without a bar."""
        if self.bar is None:
            return ""
        return f"{self.bar} {'met' if self.bar.is_met(self.ratio) else 'NOT MET'}"

    def to_dict(self) -> dict[str, Any]:
        bar = {}
        if self.bar is not None:
            bar = {"bar": str(self.bar), "met": self.bar.is_met(self.ratio)}
        return {
            "metric": self.metric,
            "value": _round(self.value),
            "unit": self.unit,
            "peer": self.peer,
            "peer_value": _round(self.peer_value),
            "ratio": _round(self.ratio),
            **bar,
            **({"details": self.details} if self.details else {}),
        }


def make_report(name: str, results: list[Result], **settings: Any) -> dict[str, Any]:
    """The report as plain data; settings: what else the figures depend on."""
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "settings": settings,
        "machine": {
            "cpu": cpu_name(),
            "isa": machine.instruction_set(),
            "threads": machine.allowed_cores(),
            "memory_bandwidth_gbps": round(machine.memory_bandwidth_gbps(1 << 30), 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("pagoda-serve", "torch", "transformers")},
        },
        "results": [result.to_dict() for result in results],
    }


def publish(name: str, results: list[Result], path: Path, **settings: Any) -> None:
    """Print the table and write the file."""
    print(format_table(results))
    report = make_report(name, results, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {path}.")


def format_table(results: list[Result]) -> str:
    rows = [("metric", "value", "beside", "ratio", "bar", "unit", "beside is")]
    rows += [
        (
            result.metric,
            f"{_round(result.value):g}",
            f"{_round(result.peer_value):g}",
            f"{result.ratio:.3f}",
            result.verdict,
            result.unit,
            result.peer,
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def current_commit() -> str:
    """The commit of the working tree, with `-dirty` if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _round(value: float) -> float:
    return round(value, 3)
