"""The names that the operator gives (group, labels, field managers, children), and manifests.

Changing one of the names orphans what an older operator made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""

GROUP = "pagoda.dev"
VERSION = "v1alpha1"
KIND = "LLMService"
PLURAL = "llmservices"
API_VERSION = f"{GROUP}/{VERSION}"

MANAGER = "pagoda"
"""Field manager of the children and of the status."""
SCALING_MANAGER = "pagoda-scaling"
"""Field manager of `spec.replicas` of the Deployment."""

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "pagoda"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_SERVICE = "pagoda.dev/service"
LABEL_REVISION = "pagoda.dev/revision"
ANNOTATION_IMAGE = "pagoda.dev/engine-image"
"""Of a Deployment: the image that the operator gave engines whose spec names none."""
LABEL_JOB = "batch.kubernetes.io/job-name"
"""By which Kubernetes tells whose pod a Job's is."""
PRELOAD = "preload"
"""The component whose pods fill a claim."""
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
"""By which Kueue finds what it admits."""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Which LLMService."""

    namespace: str
    name: str

    @classmethod
    def of(cls, service: Manifest) -> Key:
        return cls(service["metadata"]["namespace"], service["metadata"]["name"])

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class ChildRef:
    """Which child, within the namespace of its LLMService."""

    kind: str
    name: str

    @classmethod
    def of(cls, manifest: Manifest) -> ChildRef:
        return cls(manifest["kind"], manifest["metadata"]["name"])

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


RESOURCES = {
    "LLMService": (GROUP, VERSION, PLURAL),
    "Deployment": ("apps", "v1", "deployments"),
    "Job": ("batch", "v1", "jobs"),
    "Service": ("", "v1", "services"),
    "ServiceAccount": ("", "v1", "serviceaccounts"),
    "NetworkPolicy": ("networking.k8s.io", "v1", "networkpolicies"),
    "PodDisruptionBudget": ("policy", "v1", "poddisruptionbudgets"),
    "PodMonitor": ("monitoring.coreos.com", "v1", "podmonitors"),
    "PrometheusRule": ("monitoring.coreos.com", "v1", "prometheusrules"),
    "Pod": ("", "v1", "pods"),
    "Event": ("", "v1", "events"),
    "Lease": ("coordination.k8s.io", "v1", "leases"),
}
"""kind → (group, version, plural) of every kind that the operator reads or writes"""
CHILD_KINDS = (
    "ServiceAccount",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Job",
    "Deployment",
)
"""In the order in which they are applied: a pod needs its ServiceAccount."""
WATCHED_KINDS = (KIND, *CHILD_KINDS, "Pod")
OPTIONAL_KINDS = ("PodMonitor", "PrometheusRule")
"""Children whose CRDs are prometheus-operator's. They are not watched: a cluster may get the CRDs
after the operator. What is edited in them is noticed by the lists of the resync."""


def api_version(kind: str) -> str:
    """What manifests of the kind have as apiVersion."""
    group, version, _ = RESOURCES[kind]
    return f"{group}/{version}" if group else version


def digest(content: Manifest) -> str:
    """Another one for other content, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def same_object(live: Manifest, **content: Any) -> Manifest:
    """What to apply to this object alone: the uid keeps it off one that was made anew."""
    metadata = {key: live["metadata"][key] for key in ("name", "namespace", "uid")}
    kind = live["kind"]
    return {"apiVersion": api_version(kind), "kind": kind, "metadata": metadata, **content}


def is_leaving(manifest: Manifest) -> bool:
    """Whether the object is being deleted."""
    return "deletionTimestamp" in manifest["metadata"]


def find_condition(status: Manifest, kind: str) -> Manifest:
    """The condition of that type in a status; an empty one if there is none."""
    conditions: list[Manifest] = status.get("conditions", [])
    return next((entry for entry in conditions if entry.get("type") == kind), {})


def engine_name(service_name: str) -> str:
    """Name of every child but the Service."""
    return f"{service_name}-engine"


def selector_labels(service_name: str) -> dict[str, str]:
    """Labels by which Deployment and Service find the engine's pods; they never change."""
    return {LABEL_COMPONENT: "engine", LABEL_SERVICE: service_name}


def common_labels(service_name: str) -> dict[str, str]:
    """Labels of every child and pod of an LLMService."""
    return {
        "app.kubernetes.io/name": "pagoda",
        "app.kubernetes.io/instance": service_name,
        LABEL_MANAGED_BY: MANAGED_BY,
        **selector_labels(service_name),
    }
