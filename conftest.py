"""Settings of the whole test run: properties without deadlines, GPU tests without a GPU, and the
count per level at the end."""

from __future__ import annotations

import collections
import contextlib

import pytest

# The Python of a machine with a GPU need not have it.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # A stalled machine is no failure of the example that it stalls in.
    settings.register_profile("pagoda", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("pagoda")

# A level is the first of these that a test's path or marker names.
LEVELS = ("cluster", "gpu", "model", "contract", "unit")


def level_of(item: pytest.Item) -> str:
    if item.path.is_relative_to(item.config.rootpath / "e2e"):
        return "cluster"
    for level in LEVELS:
        if item.get_closest_marker(level):
            return level
    return "contract" if "contract" in item.path.parts else "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.append(("level", level_of(item)))
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    skipped: list[str] = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            # A file that cannot be imported has a report, but no test and so no level.
            level = dict(getattr(report, "user_properties", ())).get("level", "unit")
            counts[level][outcome] += 1
            if outcome == "skipped":
                skipped.append(report.nodeid)
    terminalreporter.section("tests per level")
    for level in LEVELS:
        if level in counts:
            line = ", ".join(f"{number} {outcome}" for outcome, number in counts[level].items())
            terminalreporter.write_line(f"{level:<9} {line}")
    for nodeid in skipped:
        terminalreporter.write_line(f"skipped: {nodeid}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
