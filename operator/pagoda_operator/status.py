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

from pagoda_operator.causes import Cause
from pagoda_operator.names import Manifest, find_condition, selector_labels
from pagoda_operator.render import revision_of
from pagoda_operator.spec import LLMService

Condition = tuple[bool | None, str, str]
"""(status, reason, message); None is Unknown."""
Conditions = dict[str, Condition]
"""type → condition"""

MAX_MESSAGE = 1024
STARTING = Cause("Progressing", "The engines are being started.", False)


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

    def fields(self, desired_replicas: int) -> Manifest:
        """The counts as the status has them."""
        return {
            "replicas": self.total,
            "updatedReplicas": self.updated,
            "readyReplicas": self.ready,
            "desiredReplicas": desired_replicas,
            "summary": f"{self.ready}/{desired_replicas}",
        }


def is_seen(status: Manifest) -> bool:
    """Whether an operator has written this status; the CRD's default is generation -1."""
    return bool(status.get("observedGeneration", -1) >= 1)


def make_status(
    service: LLMService,
    *,
    deployment: Manifest | None,
    cause: Cause | None,
    desired_replicas: int,
    is_applied: bool = True,
    is_reachable: bool = True,
) -> tuple[Manifest, Conditions]:
    """The fields of the status and the four conditions, for `stamp`.

    Args:
        deployment: the live one of this service, never a stranger's.
        cause: what is wrong with the pods, or keeps the children from being what they should be.
        is_applied: every child is as the spec asks; if not, `cause` says why.
        is_reachable: the Service in front of the engines is there and is ours.
    """
    counts = Counts.of(deployment)
    labels = selector_labels(service.key.name)
    fields: Manifest = {
        "url": f"http://{service.key.name}.{service.key.namespace}.svc/v1",
        "modelName": service.model_name,
        "selector": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        **counts.fields(desired_replicas),
    }
    if deployment is not None:
        fields["revision"] = revision_of(deployment)
    available = _available(counts, desired_replicas, service.spec.suspend, is_reachable)
    if cause is not None and not is_applied:
        return fields, _hindered(available, cause)
    return fields, _conditions(service, counts, cause, desired_replicas, available)


def failed_status(
    cause: Cause, counts: Counts | None, previous: Manifest
) -> tuple[Manifest, Conditions]:
    """The same of a spec that could not be read, or whose children could not.

    Args:
        counts: None where the pods are not known; what was known of them stays.
    """
    fields = {key: value for key, value in previous.items() if key != "conditions"}
    if counts is None:
        return fields, _hindered((None, cause.reason, "The pods could not be read."), cause)
    desired = previous.get("desiredReplicas", counts.total)
    available = _available(counts, desired, False, True)
    return fields | counts.fields(desired), _hindered(available, cause)


def stamp(
    fields: Manifest, conditions: Conditions, previous: Manifest, generation: int, now: datetime
) -> Manifest:
    """The status to write if it differs from the previous one.

    Args:
        generation: of the spec that the status is about.
        now: in UTC; the time of the conditions that change with this status.
    """
    merged = _merge_conditions(conditions, previous, generation, now)
    return {**fields, "observedGeneration": generation, "conditions": merged}


def _merge_conditions(
    conditions: Conditions, previous: Manifest, generation: int, now: datetime
) -> list[Manifest]:
    """Conditions as the API has them; the transition time moves only with the status."""
    merged = []
    for kind, (is_true, reason, message) in conditions.items():
        text = {True: "True", False: "False", None: "Unknown"}[is_true]
        before = find_condition(previous, kind)
        since = before.get("lastTransitionTime") if before.get("status") == text else None
        merged.append(
            {
                "type": kind,
                "status": text,
                "reason": reason,
                "message": _one_line(message),
                "observedGeneration": generation,
                "lastTransitionTime": since or now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
    return merged


def _one_line(text: str) -> str:
    """As much as a condition has room for."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def _conditions(
    service: LLMService, counts: Counts, cause: Cause | None, desired: int, available: Condition
) -> Conditions:
    needed = service.spec.min_replicas
    if needed == 0:
        # Nothing runs because nothing should: there is nothing that could be wrong.
        if counts.total:
            return _in_progress(available, "ScalingDown", "The replicas are being stopped.")
        reason = "Suspended" if service.spec.suspend else "ScaledToZero"
        return _settled(available, reason, "No replica runs, as the spec asks.")
    is_in_force = (
        counts.is_current and counts.total == counts.updated and counts.available >= needed
    )
    if not is_in_force or (cause is not None and cause.is_stalled):
        return _hindered(available, cause or STARTING)
    if counts.available < desired:
        # The spec asks for no more than the minimum, so that kstatus need not wait for the rest.
        why = cause or STARTING
        text = f"{counts.available} of {desired} replicas serve. {why.message}"
        return _settled(available, why.reason, text, left="The spec is in force; see Ready.")
    return _settled(available, "Serving", "The engines of the current revision serve.")


def _available(counts: Counts, desired: int, is_suspended: bool, is_reachable: bool) -> Condition:
    if counts.ready and not is_reachable:
        text = "Engines are ready, but the Service in front of them is missing or not ours."
        return False, "NoService", text
    if counts.ready >= desired and counts.ready:
        return True, "ReplicasAvailable", "Requests are answered."
    if counts.ready:
        text = f"Requests are answered by {counts.ready} of {desired} replicas."
        return True, "ReplicasAvailable", text
    if is_suspended:
        return False, "Suspended", "The service is suspended."
    return False, "NoReadyReplica", "No replica is ready."


def _settled(
    available: Condition, reason: str, message: str, left: str = "Nothing is left to do."
) -> Conditions:
    return {
        "Ready": (True, reason, message),
        "Available": available,
        "Reconciling": (False, "Settled", left),
        "Stalled": (False, "Settled", "Nothing is wrong."),
    }


def _hindered(available: Condition, cause: Cause) -> Conditions:
    if not cause.is_stalled:
        return _in_progress(available, cause.reason, cause.message)
    return {
        "Ready": (False, cause.reason, cause.message),
        "Available": available,
        "Reconciling": (False, "Stalled", "Nothing is done until the cause is gone."),
        "Stalled": (True, cause.reason, cause.message),
    }


def _in_progress(available: Condition, reason: str, message: str) -> Conditions:
    return {
        "Ready": (False, reason, message),
        "Available": available,
        "Reconciling": (True, reason, message),
        "Stalled": (False, "Progressing", "Work is under way; see Reconciling."),
    }
