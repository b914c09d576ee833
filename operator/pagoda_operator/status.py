"""The status of an LLMService: what is, and why it is not what was asked for. Pure.

Four conditions, all of them always there:

    Ready        the spec of this generation is in force (a suspended service is Ready)
    Available    a request that is sent now gets an answer
    Reconciling  work is under way (kstatus: in progress)
    Stalled      a person has to act (kstatus: failed)

and with spec.autoscaling a fifth, AutoscalingActive: the replicas follow the demand.

Nothing in it moves by itself: the same world gives the same status, so that a steady state is not
written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pagoda_operator.cause import Cause
from pagoda_operator.flags import PORT
from pagoda_operator.names import Manifest, find_condition, selector_labels
from pagoda_operator.render import revision_of
from pagoda_operator.scaling import ScalingPolicy
from pagoda_operator.spec import LLMService, LLMServiceSpec

Condition = tuple[bool | None, str, str]
"""(status, reason, message); None is Unknown."""
Conditions = dict[str, Condition]
"""type → condition"""

MAX_MESSAGE = 1024
STARTING = Cause("Progressing", "The engines are being started.", False)
STOPPING = Cause("ScalingDown", "The replicas are being stopped.", False)


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
        found = deployment or {"metadata": {}}
        status, generation = found.get("status", {}), found["metadata"].get("generation", 0)
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
    model: Manifest | None = None,
    preflight: Manifest | None = None,
    loads: Sequence[Manifest] = (),
    rollout: Manifest | None = None,
) -> tuple[Manifest, Conditions]:
    """The fields of the status and the four conditions, for `stamp`.

    Args:
        deployment: the live one of this service, never a stranger's.
        cause: what is wrong with the pods, or keeps the children from being what they should be.
        is_applied: every child is as the spec asks; if not, `cause` says why.
        is_reachable: the Service in front of the engines is there and is ours.
        model: what the engine that was ready last says that it runs.
        preflight: what was found before the pods were made.
        loads: how far engines are that start.
        rollout: how changed pods replace others.
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
    if model:
        fields["model"] = model
    if preflight:
        fields["preflight"] = preflight
    if loads:
        fields["load"] = list(loads)
    if rollout:
        fields["rollout"] = rollout
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
    fields = {key: value for key, value in previous.items() if key not in ("conditions", "load")}
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
        now: in UTC; the transition time of the conditions whose own status differs.
    """
    stamped = []
    for kind, (is_true, reason, message) in conditions.items():
        text = {True: "True", False: "False", None: "Unknown"}[is_true]
        before = find_condition(previous, kind)
        since = before.get("lastTransitionTime") if before.get("status") == text else None
        stamped.append(
            {
                "type": kind,
                "status": text,
                "reason": reason,
                "message": _one_line(message),
                "observedGeneration": generation,
                "lastTransitionTime": since or now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
    return {**fields, "observedGeneration": generation, "conditions": stamped}


def autoscaling_condition(
    spec: LLMServiceSpec, *, replicas_owner: str | None, blindness: str | None
) -> Conditions:
    """The condition of a service with `spec.autoscaling`; of another one, none.

    Args:
        replicas_owner: who set `spec.replicas`; see `ownership.replicas_owner`.
        blindness: why the load is not known; see `Poller.blindness`.
    """
    if spec.autoscaling is None:
        return {}
    if spec.autoscaling.driver == "External" and not spec.suspend:
        return {"AutoscalingActive": (None, "External", _describe_external(spec))}
    is_active, reason, message = _describe_scaling(spec, blindness)
    if replicas_owner is not None:
        reason = "ReplicasIgnored" if is_active else reason
        message += (
            f" spec.replicas: {spec.replicas}, set by {replicas_owner}, has no effect beside "
            "spec.autoscaling; remove one of them."
        )
    return {"AutoscalingActive": (is_active, reason, message)}


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
            return _hindered(available, STOPPING)
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
    if counts.ready:
        by = "" if counts.ready >= desired else f" by {counts.ready} of {desired} replicas"
        return True, "ReplicasAvailable", f"Requests are answered{by}."
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
    why = (cause.reason, cause.message)
    reconciling: Condition = (True, *why)
    stalled: Condition = (False, "Progressing", "Work is under way; see Reconciling.")
    if cause.is_stalled:
        reconciling = (False, "Stalled", "Nothing is done until the cause is gone.")
        stalled = (True, *why)
    return {
        "Ready": (False, *why),
        "Available": available,
        "Reconciling": reconciling,
        "Stalled": stalled,
    }


def _describe_external(spec: LLMServiceSpec) -> str:
    text = "An autoscaler of yours sets spec.replicas through /scale."
    if spec.replicas != spec.min_replicas:
        text += f" spec.replicas: {spec.replicas} is out of bounds; {spec.min_replicas} are kept."
    return text


def _describe_scaling(spec: LLMServiceSpec, blindness: str | None) -> tuple[bool, str, str]:
    if spec.suspend:
        return False, "Suspended", "The service is suspended."
    if ScalingPolicy.of(spec) is None:
        return False, "Fixed", "minReplicas is maxReplicas: the number of replicas is fixed."
    if blindness is not None:
        text = (
            f"Scaling is blind: {blindness}. Replicas are kept, and added only for the load that "
            "is known. Where a NetworkPolicy guards the pods, let the operator's pod reach their "
            f"port {PORT}."
        )
        return False, "LoadUnknown", text
    return True, "Active", "The replicas follow the demand."
