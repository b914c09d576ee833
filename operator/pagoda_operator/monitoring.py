"""What prometheus-operator makes of a service: where its metrics are, and when to alert. Pure.

The metrics are the engine's (`docs/reference/metrics.md`); `tests/contract` holds both sides to
their names.
"""

from __future__ import annotations

from pagoda_operator.child import render_child
from pagoda_operator.names import LABEL_SERVICE, Manifest, engine_name, selector_labels
from pagoda_operator.spec import Autoscaling, LLMService

MAX_FAILED_SHARE = 0.05
MAX_CACHE_SHARE = 0.95


def render_pod_monitor(service: LLMService) -> Manifest:
    """Let Prometheus read every engine; its series have the label `pagoda_dev_service`."""
    spec = {
        "selector": {"matchLabels": selector_labels(service.key.name)},
        "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}],
        "podTargetLabels": [LABEL_SERVICE],
    }
    return _with_labels(service, render_child(service, "PodMonitor", spec=spec))


def render_prometheus_rule(service: LLMService) -> Manifest:
    """The alerts of a service."""
    key = service.key
    group = {"name": f"pagoda.{key.namespace}.{key.name}", "rules": _render_alerts(service)}
    return _with_labels(service, render_child(service, "PrometheusRule", spec={"groups": [group]}))


def _with_labels(service: LLMService, manifest: Manifest) -> Manifest:
    """With those by which a Prometheus chooses what it reads."""
    metadata = manifest["metadata"]
    metadata["labels"] = {**service.spec.observability.labels, **metadata["labels"]}
    return manifest


def _render_alerts(service: LLMService) -> list[Manifest]:
    # As any configuration of Prometheus names them, whoever made it. The pattern keeps pods of the
    # service `chat-engine` out of those of `chat`.
    pods = f"{engine_name(service.key.name)}-[a-z0-9]+-[a-z0-9]+"
    where = f'namespace="{service.key.namespace}",pod=~"{pods}"'
    of_api = f'{where},handler=~"/v1/.+"'
    scaling = service.spec.autoscaling or Autoscaling(max_replicas=1)
    depth, name = scaling.target_queue_depth, f"{service.key.namespace}/{service.key.name}"
    alerts = [
        _alert(
            "PagodaRequestsWait",
            f"avg(vllm:num_requests_waiting{{{where}}}) > {depth}",
            "10m",
            f"More than {depth} requests wait at each replica of {name}.",
        ),
        _alert(
            "PagodaKvCacheFull",
            f"max(vllm:kv_cache_usage_perc{{{where}}}) > {MAX_CACHE_SHARE}"
            f" and sum(rate(vllm:num_preemptions_total{{{where}}}[10m])) > 0",
            "10m",
            f"The KV cache of {name} is full, and requests lose their blocks to others.",
        ),
        _alert(
            "PagodaRequestsFail",
            f'sum(rate(http_requests_total{{{of_api},status="5xx"}}[5m]))'
            f" / sum(rate(http_requests_total{{{of_api}}}[5m])) > {MAX_FAILED_SHARE}",
            "5m",
            f"More than {MAX_FAILED_SHARE:.0%} of the requests to {name} fail.",
            severity="critical",
        ),
    ]
    if service.spec.min_replicas:
        # An engine shows it before the model is loaded.
        expr, text = f"absent(vllm:num_requests_running{{{where}}})", f"No engine of {name} runs."
        alerts.append(_alert("PagodaNoEngine", expr, "10m", text, severity="critical"))
    return alerts


def _alert(
    name: str, expr: str, lasts: str, summary: str, *, severity: str = "warning"
) -> Manifest:
    return {
        "alert": name,
        "expr": expr,
        "for": lasts,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }
