"""The status of an LLMService: what is, and why it is not what was asked for. Pure.

Four conditions, all of them always there:

    Ready        the spec of this generation is in force (a suspended service is Ready)
    Available    a request that is sent now gets an answer
    Reconciling  work is under way (kstatus: in progress)
    Stalled      a person has to act (kstatus: failed)

and with spec.autoscaling a fifth, AutoscalingActive (see `autoscaling`).

Nothing in it moves by itself: the same world gives the same status, so that a steady state is not
written again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pagoda_operator.causes import Cause
from pagoda_operator.names import Manifest, selector_labels
from pagoda_operator.render import revision_of
from pagoda_operator.spec import LLMService

Conditions = dict[str, tuple[bool, str, str]]
"""type → (status, reason, message)"""


@dataclass(frozen=True, slots=True)
class Counts:
    """Pods as the Deployment counts them."""

    total: int
    updated: int
    ready: int
    available: int
    is_current: bool
    """Whether the counts are about the Deployment's present spec."""

    @classmethod
    def of(cls, deployment: Manifest | None) -> Counts:
        if deployment is None:
            return cls(0, 0, 0, 0, False)
        status = deployment.get("status", {})
        generation = deployment["metadata"].get("generation", 0)
        return cls(
            total=status.get("replicas", 0),
            updated=status.get("updatedReplicas", 0),
            ready=status.get("readyReplicas", 0),
            available=status.get("availableReplicas", 0),
            is_current=status.get("observedGeneration", 0) >= generation,
        )


def make_status(
    service: LLMService,
    *,
    deployment: Manifest | None,
    cause: Cause | None,
    desired_replicas: int,
    previous: Manifest,
    now: datetime,
    further: Conditions | None = None,
) -> Manifest:
    """The status to write if it differs from the previous one.

    Args:
        cause: what is wrong with the pods, or keeps the children from being made.
        previous: the status that the object has, {} at first.
        now: in UTC; the time of the conditions that change with this status.
        further: conditions beside the four.
    """
    counts = Counts.of(deployment)
    labels = selector_labels(service.key.name)
    status: Manifest = {
        "observedGeneration": service.generation,
        "url": f"http://{service.key.name}.{service.key.namespace}.svc/v1",
        "modelName": service.model_name,
        "selector": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "replicas": counts.total,
        "updatedReplicas": counts.updated,
        "readyReplicas": counts.ready,
        "desiredReplicas": desired_replicas,
        "summary": f"{counts.ready}/{desired_replicas}",
    }
    if deployment is not None:
        status["revision"] = revision_of(deployment)
    conditions = _conditions(service, counts, cause) | (further or {})
    status["conditions"] = merge_conditions(conditions, previous, service.generation, now)
    return status


def failed_status(
    generation: int, reason: str, message: str, *, previous: Manifest, now: datetime
) -> Manifest:
    """The status of a spec that nothing was done for; what is known of the pods stays as it was."""
    available = _previous_condition(previous, "Available")
    conditions: Conditions = {
        "Ready": (False, reason, message),
        "Available": (
            available.get("status") == "True",
            available.get("reason", "NoReadyReplica"),
            available.get("message", "No replica is ready."),
        ),
        "Reconciling": (False, "Stalled", "Nothing is done until the cause is gone."),
        "Stalled": (True, reason, message),
    }
    kept = {key: value for key, value in previous.items() if key != "conditions"}
    merged = merge_conditions(conditions, previous, generation, now)
    return {**kept, "observedGeneration": generation, "conditions": merged}


def merge_conditions(
    conditions: Conditions, previous: Manifest, generation: int, now: datetime
) -> list[Manifest]:
    """Conditions as the API has them; the transition time moves only with the status."""
    merged = []
    for kind, (is_true, reason, message) in conditions.items():
        text = "True" if is_true else "False"
        before = _previous_condition(previous, kind)
        since = before.get("lastTransitionTime") if before.get("status") == text else None
        merged.append(
            {
                "type": kind,
                "status": text,
                "reason": reason,
                "message": message,
                "observedGeneration": generation,
                "lastTransitionTime": since or now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
    return merged


def _previous_condition(previous: Manifest, kind: str) -> dict[str, Any]:
    entries: list[Manifest] = previous.get("conditions", [])
    return next((entry for entry in entries if entry.get("type") == kind), {})


def _conditions(service: LLMService, counts: Counts, cause: Cause | None) -> Conditions:
    needed = service.spec.min_replicas
    available = _available(service, counts)
    if needed == 0:
        # Nothing runs because nothing should: there is nothing that could be wrong.
        if counts.total:
            return _in_progress(available, "ScalingDown", "The replicas are being stopped.")
        reason = "Suspended" if service.spec.suspend else "ScaledToZero"
        return _settled(available, reason, "No replica runs, as the spec asks.")
    is_in_force = (
        counts.is_current and counts.total == counts.updated and counts.available >= needed
    )
    if is_in_force and (cause is None or not cause.is_stalled):
        return _settled(available, "Serving", "The engines of the current revision serve.")
    if cause is not None and cause.is_stalled:
        return {
            "Ready": (False, cause.reason, cause.message),
            "Available": available,
            "Reconciling": (False, "Stalled", "Nothing is done until the cause is gone."),
            "Stalled": (True, cause.reason, cause.message),
        }
    if cause is not None:
        return _in_progress(available, cause.reason, cause.message)
    return _in_progress(available, "Progressing", "The engines are being started.")


def _available(service: LLMService, counts: Counts) -> tuple[bool, str, str]:
    if counts.ready:
        return True, "ReplicasAvailable", "Requests are answered."
    if service.spec.suspend:
        return False, "Suspended", "The service is suspended."
    return False, "NoReadyReplica", "No replica is ready."


def _settled(available: tuple[bool, str, str], reason: str, message: str) -> Conditions:
    return {
        "Ready": (True, reason, message),
        "Available": available,
        "Reconciling": (False, "Settled", "Nothing is left to do."),
        "Stalled": (False, "Settled", "Nothing is wrong."),
    }


def _in_progress(available: tuple[bool, str, str], reason: str, message: str) -> Conditions:
    return {
        "Ready": (False, reason, message),
        "Available": available,
        "Reconciling": (True, reason, message),
        "Stalled": (False, "Progressing", "Nothing is wrong."),
    }
