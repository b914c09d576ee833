"""From an LLMService to the manifests of its children.

Pure, and a contract: the same spec gives the same bytes in every release, because another pod
template would restart every engine when the operator is upgraded.
"""

from __future__ import annotations

from collections.abc import Collection

from pagoda_operator.child import render_child
from pagoda_operator.flags import PORT
from pagoda_operator.monitoring import render_pod_monitor, render_prometheus_rule
from pagoda_operator.names import (
    ANNOTATION_IMAGE,
    LABEL_REVISION,
    ChildRef,
    Manifest,
    digest,
    selector_labels,
)
from pagoda_operator.pod import queue_labels, render_pod_template
from pagoda_operator.preload import render_preload
from pagoda_operator.spec import LLMService, Strategy

# A pod may load for the whole of its startup timeout; only then has the rollout failed.
PROGRESS_MARGIN_SECONDS = 300
# Of the operator's own pods, whatever the release (`charts/pagoda`).
OPERATOR_LABELS = {"app.kubernetes.io/name": "pagoda-operator"}
# The API server gives it to every namespace.
NAMESPACE_LABEL = "kubernetes.io/metadata.name"


def render_children(
    service: LLMService,
    *,
    engine_image: str,
    strategy: Strategy | None = None,
    operator_namespace: str | None = None,
    served: Collection[str] = (),
) -> dict[ChildRef, Manifest]:
    """Every child that the service should have, in the order in which they are applied.

    The Deployment has no `spec.replicas`: the plan adds it where the renderer has to send it.

    Args:
        engine_image: the image of engines whose spec names none.
        strategy: of rollouts; None: that of the spec, or the one that Auto begins with.
        operator_namespace: where the operator's pod is; None if that is not known.
        served: those of OPTIONAL_KINDS that the cluster knows.
    """
    children = [render_service_account(service), render_service(service)]
    if service.spec.network_policy.enabled:
        children.append(render_network_policy(service, operator_namespace))
    if (budget := render_disruption_budget(service)) is not None:
        children.append(budget)
    if service.spec.cache.preload:
        children.append(render_preload(service, engine_image))
    children.append(render_deployment(service, engine_image=engine_image, strategy=strategy))
    if "PodMonitor" in served and service.spec.observability.monitor == "Auto":
        children.append(render_pod_monitor(service))
    if "PrometheusRule" in served and service.spec.observability.prometheus_rule:
        children.append(render_prometheus_rule(service))
    return {ChildRef.of(child): child for child in children}


def render_service_account(service: LLMService) -> Manifest:
    """An account without rights, so that engines do not run as the namespace's default."""
    return render_child(service, "ServiceAccount", automountServiceAccountToken=False)


def render_service(service: LLMService) -> Manifest:
    """The front door: what OpenAI clients in the cluster connect to."""
    spec = {
        "type": "ClusterIP",
        "selector": selector_labels(service.key.name),
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT}],
    }
    return render_child(service, "Service", spec=spec)


def render_network_policy(service: LLMService, operator_namespace: str | None = None) -> Manifest:
    """Who may connect to the engines: the peers of the spec, and the operator for `/load`."""
    peers = service.spec.network_policy.from_ or ({"podSelector": {}},)
    # By its labels alone, a pod of any namespace could pass for the operator.
    home = {"matchLabels": {NAMESPACE_LABEL: operator_namespace}} if operator_namespace else {}
    operator = {"namespaceSelector": home, "podSelector": {"matchLabels": OPERATOR_LABELS}}
    ports = [{"port": PORT, "protocol": "TCP"}]
    spec = {
        "podSelector": {"matchLabels": selector_labels(service.key.name)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [*peers, operator], "ports": ports}],
    }
    return render_child(service, "NetworkPolicy", spec=spec)


def render_disruption_budget(service: LLMService) -> Manifest | None:
    """How many replicas a drain of nodes may take at once; None: one replica that may be moved."""
    disruption = service.spec.disruption
    if disruption.min_available is not None:
        bound = {"minAvailable": disruption.min_available}
    elif disruption.max_unavailable is not None:
        bound = {"maxUnavailable": disruption.max_unavailable}
    elif service.spec.max_replicas > 1:
        bound = {"maxUnavailable": 1}
    else:
        return None
    spec = {
        "selector": {"matchLabels": selector_labels(service.key.name)},
        **bound,
        # A replica that loads or fails answers nobody: it does not hold up a node's drain.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return render_child(service, "PodDisruptionBudget", spec=spec)


def render_deployment(
    service: LLMService, *, engine_image: str, strategy: Strategy | None = None
) -> Manifest:
    """The engines."""
    template, rollout = render_pod_template(service, engine_image), service.spec.rollout
    template["metadata"]["labels"][LABEL_REVISION] = digest(template)[:10]
    deadline = service.spec.lifecycle.startup_timeout_seconds + PROGRESS_MARGIN_SECONDS
    spec = {
        "selector": {"matchLabels": selector_labels(service.key.name)},
        "strategy": _render_strategy(strategy or rollout.first_strategy),
        "progressDeadlineSeconds": rollout.progress_deadline_seconds or deadline,
        "revisionHistoryLimit": 3,
        "template": template,
        **({"paused": True} if rollout.paused else {}),
    }
    manifest = render_child(service, "Deployment", spec=spec)
    manifest["metadata"]["labels"] |= queue_labels(service)
    manifest["metadata"]["annotations"] = {ANNOTATION_IMAGE: engine_image}
    return manifest


def revision_of(deployment: Manifest) -> str:
    """The revision of the pods that a Deployment asks for."""
    labels = deployment["spec"]["template"]["metadata"].get("labels", {})
    return str(labels.get(LABEL_REVISION, ""))


def _render_strategy(strategy: Strategy) -> Manifest:
    if strategy == "Recreate":
        return {"type": "Recreate"}
    surge = int(strategy == "Surge")
    rolling = {"maxSurge": surge, "maxUnavailable": 1 - surge}
    return {"type": "RollingUpdate", "rollingUpdate": rolling}
