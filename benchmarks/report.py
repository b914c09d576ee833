"""What every benchmark writes: a table on the screen and one JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pagoda_runtime.execution import machine


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of ours beside the peer's; higher is better unless the metric says otherwise."""

    metric: str
    value: float
    unit: str
    peer: str
    peer_value: float

    @property
    def ratio(self) -> float:
        return self.value / self.peer_value


def make_report(name: str, results: list[Result], packages: list[str]) -> dict[str, Any]:
    """The report as plain data; packages: whose versions matter."""
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "machine": {
            "cpu": cpu_name(),
            "isa": machine.instruction_set(),
            "threads": machine.allowed_cores(),
            "memory_bandwidth_gbps": round(machine.memory_bandwidth_gbps(1 << 30), 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "results": [
            {**_rounded(asdict(result)), "ratio": round(result.ratio, 3)} for result in results
        ],
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def format_table(results: list[Result]) -> str:
    rows = [("metric", "pagoda", "peer", "ratio", "unit", "peer's name")]
    rows += [
        (r.metric, f"{r.value:.1f}", f"{r.peer_value:.1f}", f"{r.ratio:.2f}", r.unit, r.peer)
        for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def current_commit() -> str:
    """The commit of the working tree, with `-dirty` if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()
    }
