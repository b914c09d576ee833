"""Alerts and dashboard ask for metrics that engines have, and by labels that these have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pagoda_operator.monitoring import render_prometheus_rule
from pagoda_operator.testing import make_service

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "charts" / "pagoda" / "dashboards" / "llmservices.json"
SERIES = re.compile(r"((?:vllm:|http_)\w+)(?:\{([^}]*)\})?")
ROW = re.compile(r"\| `([\w:]+)` \| (\w+) \| ([^|]*) \|")
# What Prometheus adds to each series of a PodMonitor's pods.
TARGET_LABELS = {"namespace", "pod", "pagoda_dev_service"}


def known_series() -> dict[str, set[str]]:
    """Every series that an engine shows, with its labels, by the page made from its code."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs/reference/metrics.md").read_text().splitlines():
        if (row := ROW.match(line)) is not None:
            name, kind, labels = row.groups()
            own = set(re.findall(r"`(\w+)`", labels))
            found[f"{name}_bucket" if kind == "histogram" else name] = own | {"le"}
    return found


def asked_series() -> list[tuple[str, str]]:
    """(name, selector) of every series in an alert, a panel or a variable."""
    (group,) = render_prometheus_rule(make_service())["spec"]["groups"]
    board = json.loads(DASHBOARD.read_text())
    texts = [rule["expr"] for rule in group["rules"]]
    texts += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    texts += [str(variable["query"]) for variable in board["templating"]["list"]]
    return [found for text in texts for found in SERIES.findall(text)]


def test_alerts_and_dashboard_ask_for_series_that_engines_show() -> None:
    known, asked = known_series(), asked_series()
    assert len(asked) > 20
    for name, selector in asked:
        labels = set(re.findall(r"(\w+)=~?\"", selector))
        assert name in known
        assert labels <= known[name] | TARGET_LABELS, name
