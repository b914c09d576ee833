"""Why a pod does not serve: from the state of pods and Deployment to one cause. Pure.

Only pods of the current revision count, and only as long as they are not ready: a cause is gone
as soon as its pod is gone or well, so that a corrected spec clears it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda_operator.cause import Cause
from pagoda_operator.containers import (
    CRASHES_UNTIL_STALLED,
    KILLED_EXIT_CODES,
    cause_of_container,
    cause_of_warnings,
    find_end,
)
from pagoda_operator.names import LABEL_REVISION, Manifest, find_condition, is_leaving
from pagoda_operator.scheduling import cause_of_gates, cause_of_unscheduled
from pagoda_operator.spec import LLMServiceSpec

OWN_CONTAINERS = ("engine", "preload")


def find_cause(
    spec: LLMServiceSpec,
    deployment: Manifest,
    pods: Sequence[Manifest],
    revision: str,
    events: Sequence[Manifest] = (),
) -> Cause | None:
    """The cause that weighs most, or None if nothing is known to be wrong.

    Args:
        events: those that `events_of` asks for.
    """
    living = [
        pod for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])) if is_living(pod)
    ]
    current = [pod for pod in living if _revision(pod) == revision]
    waiting = [pod for pod in current if not is_ready(pod)]
    older = [pod for pod in living if _revision(pod) != revision]
    failed = [pod for pod in failed_pods(pods) if _revision(pod) == revision]
    found = [
        # First, because it says why the pod that takes its place is loading the model again.
        _cause_of_failed(failed, current) if waiting else None,
        *(cause_of_pod(spec, pod, older, events) for pod in waiting),
    ]
    ending = _cause_of_ending(pods)
    if older or not current:
        found.append(_cause_of_pause(deployment, older))
    if not current:
        found.append(ending)
    elif ending is not None:
        # What has no room yet gets that of the pods that end.
        found = [ending if it and _is_want_of_room(it) else it for it in found]
    causes = [cause for cause in found if cause is not None]
    if (cause := _cause_of_deployment(deployment, causes, revision, older)) is not None:
        causes.append(cause)
    # min keeps the first of equals, and pods are in order: the same state gives the same words.
    return min(causes, key=lambda cause: not cause.is_stalled, default=None)


def is_living(pod: Manifest) -> bool:
    """Whether the pod has not ended, and is not told to."""
    phase = pod.get("status", {}).get("phase")
    return not is_leaving(pod) and phase in ("Pending", "Running", "Unknown")


def is_ready(pod: Manifest) -> bool:
    """Whether the pod answers requests, as the kubelet sees it."""
    return find_condition(pod.get("status", {}), "Ready").get("status") == "True"


def is_unstarted(pod: Manifest) -> bool:
    """Whether the pod has a node on which its container was never created, or waits for claims
    of which the scheduler says nothing as long as they do not exist.
    """
    status = pod.get("status", {})
    scheduled = find_condition(status, "PodScheduled").get("status")
    has_claims = "resourceClaims" in pod.get("spec", {})
    return (
        status.get("phase") == "Pending"
        and (scheduled == "True" or (scheduled is None and has_claims))
        and all(
            entry.get("state", {}).get("waiting", {}).get("reason") in (None, "ContainerCreating")
            for entry in status.get("containerStatuses", [])
        )
    )


def events_of(pod: Manifest) -> str | None:
    """The field selector of the events that say more of the pod than its status; None: none do."""
    if is_unstarted(pod):
        return "type=Warning"
    if is_ready(pod):
        return None
    killed = (
        ended
        for status in pod.get("status", {}).get("containerStatuses", [])
        if (ended := find_end(status))
        and ended.get("exitCode") in KILLED_EXIT_CODES
        and ended.get("reason") != "OOMKilled"
    )
    return "reason=Killing" if any(killed) else None


def failed_pods(pods: Sequence[Manifest]) -> list[Manifest]:
    """Pods that their node ended (evicted, shut down): they never come back. Newest first."""
    failed = [
        pod
        for pod in pods
        if not is_leaving(pod) and pod.get("status", {}).get("phase") == "Failed"
    ]
    return sorted(failed, key=lambda pod: (_created(pod), pod["metadata"]["name"]), reverse=True)


def cause_of_refusal(reason: str, message: str) -> Cause:
    """The cause when the API server refuses an object; a quota has a reason of its own."""
    if "exceeded quota" in message:
        text = f"{message.rstrip('.')}. Raise the quota of the namespace, or lower spec.resources."
        return Cause("QuotaExceeded", text, True)
    text = f"{message.rstrip('.')}. Correct the field that it names, or the policy that forbids it."
    return Cause(reason, text, True)


def _revision(pod: Manifest) -> str:
    return str(pod["metadata"].get("labels", {}).get(LABEL_REVISION, ""))


def _created(pod: Manifest) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))


def _cause_of_failed(failed: Sequence[Manifest], current: Sequence[Manifest]) -> Cause | None:
    # What failed before a pod that is ready now is past.
    since = max((_created(pod) for pod in current if is_ready(pod)), default="")
    failed = [pod for pod in failed if _created(pod) > since or not since]
    if not failed:
        return None
    status = failed[0]["status"]
    why = str(status.get("reason", "no reason given"))
    text = f"The node ended the pod ({why}): {status.get('message', '')}"
    if '"shm"' in text:
        text += " Raise spec.resources.sharedMemory."
    elif "memory" in text:
        text += " Set spec.resources.memory to what the engine needs."
    elif "EmptyDir" in text or "ephemeral" in text:
        text += " Raise spec.cache.sizeLimit or spec.resources.ephemeralStorage."
    is_stalled = len(failed) >= CRASHES_UNTIL_STALLED
    return Cause("Evicted" if why == "Evicted" else "PodFailed", text, is_stalled)


def _cause_of_ending(pods: Sequence[Manifest]) -> Cause | None:
    ending = sorted(pod["metadata"]["name"] for pod in pods if is_leaving(pod))
    if not ending:
        return None
    text = f"New engines start when {', '.join(ending)} has ended."
    return Cause("DrainingOldPods", text, False)


def _is_want_of_room(cause: Cause) -> bool:
    return cause.reason.startswith("Insufficient") or cause.reason == "NoRoomToSurge"


def _cause_of_pause(deployment: Manifest, older: Sequence[Manifest]) -> Cause | None:
    if not deployment.get("spec", {}).get("paused"):
        return None
    serving = _describe_serving(older)
    text = f"spec.rollout.paused holds the engines that the spec asks for back{serving}."
    return Cause("RolloutPaused", text, False)


def _describe_serving(older: Sequence[Manifest]) -> str:
    """Which earlier revisions go on, as words that can end a sentence."""
    revisions = sorted({_revision(pod) for pod in older if is_ready(pod)})
    return f"; the engines of revision {' and '.join(revisions)} serve on" if revisions else ""


def cause_of_pod(
    spec: LLMServiceSpec, pod: Manifest, older: Sequence[Manifest], events: Sequence[Manifest]
) -> Cause | None:
    """Why a pod that is not ready is not, as far as it is known.

    Args:
        older: pods of earlier revisions, which may hold the room that it needs.
    """
    pod_status = pod.get("status", {})
    scheduled = find_condition(pod_status, "PodScheduled")
    if scheduled.get("reason") == "SchedulingGated":
        return cause_of_gates(spec, pod)
    if scheduled.get("status") == "False":
        return cause_of_unscheduled(spec, str(scheduled.get("message", "")), older)
    if is_unstarted(pod):
        return cause_of_warnings(pod, events)
    if find_condition(pod_status, "ContainersReady").get("status") == "True":
        return _cause_of_well(pod)
    statuses = pod_status.get("containerStatuses", [])
    # A sidecar that somebody injected comes last, whatever its name.
    for status in sorted(statuses, key=lambda status: status["name"] not in OWN_CONTAINERS):
        if (cause := cause_of_container(spec, pod, status, events)) is not None:
            return cause
    return None


def _cause_of_well(pod: Manifest) -> Cause:
    """Why a pod is not ready whose containers all are, as their kubelet said last."""
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", [])]
    conditions = pod["status"]
    closed = [gate for gate in gates if find_condition(conditions, gate).get("status") != "True"]
    if closed:
        text = f"The engine is ready, but the pod's readiness gate {' and '.join(closed)} is not "
        return Cause("ReadinessGateClosed", text + "true; whoever sets it knows why.", False)
    node = pod["spec"].get("nodeName")
    text = (
        f"The node {node} does not answer: its kubelet, the machine or the network is down. "
        "Kubernetes starts the engine on another node after some minutes."
    )
    return Cause("NodeUnreachable", text, False)


def _cause_of_deployment(
    deployment: Manifest, of_pods: Sequence[Cause], revision: str, older: Sequence[Manifest]
) -> Cause | None:
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return None
    failure = find_condition(status, "ReplicaFailure")
    if failure.get("status") == "True":
        return cause_of_refusal("PodsForbidden", str(failure.get("message", "")))
    if find_condition(status, "Progressing").get("reason") == "ProgressDeadlineExceeded":
        text = (
            f"The pods of revision {revision} did not become ready within "
            f"{deployment['spec']['progressDeadlineSeconds']} s{_describe_serving(older)}."
        )
        text = " ".join([text, *(cause.message for cause in of_pods[:1])])
        return Cause("ProgressDeadlineExceeded", text, True)
    return None
