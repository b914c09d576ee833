"""Whether the replicas follow the demand: the condition `AutoscalingActive`. Pure."""

from __future__ import annotations

from pagoda_operator.flags import PORT
from pagoda_operator.scaling import ScalingPolicy
from pagoda_operator.spec import LLMServiceSpec
from pagoda_operator.status import Conditions


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
    ignored = ""
    if replicas_owner is not None:
        ignored = (
            f" spec.replicas: {spec.replicas}, set by {replicas_owner}, has no effect beside "
            "spec.autoscaling; remove one of them."
        )
    is_active, reason, message = _describe(spec, blindness)
    if is_active and ignored:
        reason = "ReplicasIgnored"
    return {"AutoscalingActive": (is_active, reason, message + ignored)}


def _describe(spec: LLMServiceSpec, blindness: str | None) -> tuple[bool, str, str]:
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
