"""What a report says of where its figures come from."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from report import cpu_name, current_commit

RESULTS = Path(__file__).parents[1] / "results"
REHEARSAL = "REHEARSAL ON A CPU: these are no figures of a GPU"


def describe_run(name: str, *, rehearses: bool, commit: str | None) -> dict[str, Any]:
    """The head of a report; without a GPU it says so first.

    Args:
        commit: for a copy of the tree that git knows nothing of.
    """
    return {
        **({"rehearsal": REHEARSAL} if rehearses else {}),
        "name": f"{name}-rehearsal" if rehearses else name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or current_commit(),
        "machine": {"cpu": cpu_name()} if rehearses else describe_gpu(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "triton", "transformers")},
        },
    }


def describe_gpu() -> dict[str, Any]:
    """Of the first one."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "bandwidth_gbps": card_bandwidth_gbps(),
        "cuda": torch.version.cuda,
    }


def card_bandwidth_gbps() -> float | None:
    """GB/s that the card's memory can move by its clock and width; None where torch cannot tell."""
    properties = torch.cuda.get_device_properties(0)
    clock_khz = getattr(properties, "memory_clock_rate", None)
    width_bits = getattr(properties, "memory_bus_width", None)
    if not clock_khz or not width_bits:
        return None
    # Two transfers a cycle.
    return float(2 * clock_khz * width_bits / 8 / 1e6)


def report_path(name: str, asked: Path | None, *, rehearses: bool) -> Path:
    """Where a report goes. Raises: SystemExit for a rehearsal among results."""
    if asked is None:
        asked = Path("out", f"{name}-rehearsal.json") if rehearses else RESULTS / f"{name}.json"
    if rehearses and asked.resolve().is_relative_to(RESULTS.resolve()):
        raise SystemExit(f"{asked} is for results, and this is a rehearsal. Give another --out.")
    return asked
