"""What prometheus-operator gets of a service."""

from __future__ import annotations

import re
from typing import Any

from pagoda_operator.monitoring import render_pod_monitor, render_prometheus_rule
from pagoda_operator.render import render_deployment
from pagoda_operator.testing import make_service


def alerts(spec: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    (group,) = render_prometheus_rule(make_service(spec))["spec"]["groups"]
    assert group["name"] == "pagoda.team.chat"
    return {rule["alert"]: rule for rule in group["rules"]}


def test_prometheus_reads_the_port_that_the_engines_name() -> None:
    template = render_deployment(make_service(), engine_image="engine:1")["spec"]["template"]
    (port,) = template["spec"]["containers"][0]["ports"]
    monitor = render_pod_monitor(make_service())["spec"]
    assert [point["port"] for point in monitor["podMetricsEndpoints"]] == [port["name"]]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(monitor["podTargetLabels"]) <= set(template["metadata"]["labels"])


def test_a_prometheus_finds_both_by_labels_of_the_spec_beside_our_own() -> None:
    service = make_service({"observability": {"labels": {"release": "prometheus"}}})
    for child in (render_pod_monitor(service), render_prometheus_rule(service)):
        labels = child["metadata"]["labels"]
        assert (labels["release"], labels["pagoda.dev/service"]) == ("prometheus", "chat")


def test_requests_wait_too_long_by_the_specs_own_measure() -> None:
    assert alerts()["PagodaRequestsWait"]["expr"].endswith("> 4")
    scaled = {"autoscaling": {"maxReplicas": 2, "targetQueueDepth": 9}}
    assert alerts(scaled)["PagodaRequestsWait"]["expr"].endswith("> 9")


def test_no_engine_is_no_alarm_where_none_is_wanted() -> None:
    assert "PagodaNoEngine" in alerts()
    assert "PagodaNoEngine" not in alerts({"suspend": True})


def test_an_alert_is_about_the_pods_of_its_own_service_alone() -> None:
    for rule in alerts().values():
        assert 'namespace="team"' in rule["expr"]
        (pattern,) = set(re.findall(r'pod=~"([^"]+)"', rule["expr"]))
        assert re.fullmatch(pattern, "chat-engine-5d9c7b9f4-x2v8k")
        assert not re.fullmatch(pattern, "chat-engine-engine-5d9c7b9f4-x2v8k")
