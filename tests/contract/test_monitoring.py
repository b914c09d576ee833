"""Alerts and dashboards ask for metrics that there are, and by labels that these have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pagoda_operator.monitoring import render_prometheus_rule
from pagoda_operator.testing import make_service

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "charts" / "pagoda" / "dashboards").glob("*.json"))
PREFIXES = "vllm:|http_|controller_|workqueue_|rest_client_|leader_|pagoda_operator_"
SERIES = re.compile(rf"((?:{PREFIXES})\w+)(?:\{{([^}}]*)\}})?")
ROW = re.compile(r"\| `([\w:]+)` \| (\w+) \| ([^|]*) \|")
# What Prometheus adds to each series of a PodMonitor's pods.
TARGET_LABELS = {"namespace", "pod", "pagoda_dev_service"}


def known_series() -> dict[str, set[str]]:
    """Every series that an engine or the operator shows, with its labels, by the generated page."""
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
    texts = [rule["expr"] for rule in group["rules"]]
    for board in (json.loads(path.read_text()) for path in DASHBOARDS):
        texts += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        texts += [str(variable["query"]) for variable in board["templating"]["list"]]
    return [found for text in texts for found in SERIES.findall(text)]


def test_alerts_and_dashboards_ask_for_series_that_are_shown() -> None:
    known, asked = known_series(), asked_series()
    assert len(DASHBOARDS) == 2
    assert len(asked) > 35
    for name, selector in asked:
        labels = set(re.findall(r"(\w+)=~?\"", selector))
        assert name in known
        assert labels <= known[name] | TARGET_LABELS, name
