"""Why a pod does not serve: from the state of pods and Deployment to one cause. Pure.

Only pods of the current revision count, and only as long as they are not ready: a cause is gone
as soon as its pod is gone or well, so that a corrected spec clears it by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda_operator.flags import model_claim
from pagoda_operator.last_words import TRANSIENT_REASONS, parse_last_words, say_as_user
from pagoda_operator.names import LABEL_REVISION, Manifest, find_condition, is_leaving
from pagoda_operator.spec import LLMServiceSpec

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
# Warnings that keep a container from being created; the pod's own status says nothing of them.
START_WARNINGS = (
    "FailedMount",
    "FailedAttachVolume",
    "FailedMapVolume",
    "FailedCreatePodSandBox",
    "FailedResourceClaimCreation",
)
KINDS = {
    "secret": "Secret",
    "configmap": "ConfigMap",
    "resourceclaimtemplate.resource.k8s.io": "ResourceClaimTemplate",
}
CRASHES_UNTIL_STALLED = 3
# What differs between two equal failures (times, ids, ports of the client) would be a write of the
# status at each.
_VARYING = re.compile(
    r"\d{4}-\d\d-\d\d[T ][\d:.,]+\S*|0x[0-9a-f]+|\(?pid \d+\)?|[0-9a-f]{32,}"
    r"|(?<![\w-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|(?<=:)\d+(?=->)"
)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the service is not what its spec asks for; `is_stalled` if a person has to act."""

    reason: str
    message: str
    is_stalled: bool


def find_cause(
    spec: LLMServiceSpec,
    deployment: Manifest,
    pods: Sequence[Manifest],
    revision: str,
    events: Sequence[Manifest] = (),
) -> Cause | None:
    """The cause that weighs most, or None if nothing is known to be wrong.

    Args:
        events: warnings about the pods that `is_unstarted`.
    """
    living = [
        pod
        for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))
        if not is_leaving(pod)
        and pod.get("status", {}).get("phase") in ("Pending", "Running", "Unknown")
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
    if not current:
        found.append(_cause_of_ending(pods))
    causes = [cause for cause in found if cause is not None]
    if (cause := _cause_of_deployment(deployment, causes)) is not None:
        causes.append(cause)
    # min keeps the first of equals, and pods are in order: the same state gives the same words.
    return min(causes, key=lambda cause: not cause.is_stalled, default=None)


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


def failed_pods(pods: Sequence[Manifest]) -> list[Manifest]:
    """Pods that their node ended (evicted, shut down): they never come back. Newest first."""
    failed = [
        pod
        for pod in pods
        if not is_leaving(pod) and pod.get("status", {}).get("phase") == "Failed"
    ]
    return sorted(failed, key=lambda pod: (_created(pod), pod["metadata"]["name"]), reverse=True)


def steady(text: str) -> str:
    """The text without what differs between two equal failures."""
    return _VARYING.sub("…", text)


def cause_of_refusal(reason: str, message: str) -> Cause:
    """The cause when the API server refuses an object; a quota has a reason of its own."""
    return Cause("QuotaExceeded" if "exceeded quota" in message else reason, message, True)


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
    if "memory" in text:
        text += " Set spec.resources.memory to what the engine needs."
    is_stalled = len(failed) >= CRASHES_UNTIL_STALLED
    return Cause("Evicted" if why == "Evicted" else "PodFailed", text, is_stalled)


def _cause_of_ending(pods: Sequence[Manifest]) -> Cause | None:
    ending = sorted(pod["metadata"]["name"] for pod in pods if is_leaving(pod))
    if not ending:
        return None
    text = f"New engines start when {', '.join(ending)} has ended."
    return Cause("DrainingOldPods", text, False)


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
        return _cause_of_gates(spec, pod)
    if scheduled.get("status") == "False":
        return _cause_of_unscheduled(spec, str(scheduled.get("message", "")), older)
    if is_unstarted(pod):
        return _cause_of_warnings(pod, events)
    for status in pod_status.get("containerStatuses", []):
        state, last = status.get("state", {}), status.get("lastState", {})
        if (waiting := state.get("waiting", {})).get("reason") in IMAGE_REASONS:
            return _cause_of_image(str(status.get("image", "")), str(waiting.get("message", "")))
        if waiting.get("reason") in ("CreateContainerConfigError", "CreateContainerError"):
            message = str(waiting.get("message", ""))
            return _cause_of_missing(message) or Cause(waiting["reason"], message, True)
        terminated = state.get("terminated") or last.get("terminated")
        if terminated:
            return _cause_of_exit(spec, terminated, int(status.get("restartCount", 0)))
        if "running" in state:
            return Cause("LoadingModel", "The engine loads the model.", False)
    return None


def _cause_of_gates(spec: LLMServiceSpec, pod: Manifest) -> Cause:
    gates = ", ".join(gate["name"] for gate in pod.get("spec", {}).get("schedulingGates", []))
    queue = spec.resources.queue_name
    if queue is not None and "kueue.x-k8s.io/" in gates:
        text = f"Kueue has not admitted the pod to the queue {queue} (spec.resources.queueName) yet"
        return Cause("Queued", f"{text}; see its Workload.", False)
    return Cause("SchedulingGated", f"The pod waits until its gates are removed: {gates}.", False)


def _cause_of_unscheduled(spec: LLMServiceSpec, message: str, older: Sequence[Manifest]) -> Cause:
    claim = model_claim(spec.model.uri)
    if claim and f'persistentvolumeclaim "{claim}" not found' in message:
        text = f"The PersistentVolumeClaim {claim} of spec.model.uri does not exist in this "
        return Cause("ModelNotFound", text + "namespace; create it, or correct the uri.", True)
    if older and "Insufficient" in message and spec.rollout_strategy == "Surge":
        names = ", ".join(str(pod["metadata"]["name"]) for pod in older)
        text = (
            f"There is no room for a new engine beside {names}, which holds its own until the new "
            "one is ready. Set spec.rollout.strategy to InPlace or Recreate, which stop the old "
            f"one first, or make room. The scheduler says: {message}"
        )
        return Cause("NoRoomToSurge", text, False)
    return _cause_of_gpus(spec, message) or Cause(
        "Unschedulable", f"The scheduler says: {message}", False
    )


def _cause_of_gpus(spec: LLMServiceSpec, message: str) -> Cause | None:
    """The want of GPUs, of the wanted products where there are such, if that is what it is."""
    gpu = spec.resources.gpu
    if gpu.claims and "cannot allocate all claims" in message:
        text = "No node has devices free for spec.resources.gpu.claims. The scheduler says: "
        return Cause("InsufficientGPU", text + message, False)
    is_missing = f"Insufficient {gpu.resource_name}" in message
    text = f"No node has {spec.num_gpus} free {gpu.resource_name}"
    if gpu.products:
        # A node without the product does not match; what is insufficient is so where it matches.
        is_missing |= (
            "didn't match Pod's node affinity" in message and "Insufficient" not in message
        )
        text = (
            # One with a taint, or another label than the pods ask for, may have them.
            f"No node that takes the pods has {spec.num_gpus} free {gpu.resource_name} of the "
            f"product {' or '.join(gpu.products)} (spec.resources.gpu.products)"
        )
    if not is_missing:
        return None
    return Cause("InsufficientGPU", f"{text}. The scheduler says: {message}", False)


def _cause_of_warnings(pod: Manifest, events: Sequence[Manifest]) -> Cause | None:
    """Why the container is not created, from the latest warning that names a cause."""
    uid = pod["metadata"].get("uid")
    warnings = [
        event
        for event in events
        if event.get("involvedObject", {}).get("uid") == uid
        and event.get("reason") in START_WARNINGS
    ]
    if not warnings:
        return None

    def weight(event: Manifest) -> tuple[bool, str]:
        # That the kubelet gave up waiting is said in turn with what it waited for.
        message = str(event.get("message", ""))
        is_timeout = "timed out waiting" in message or "deadline exceeded" in message
        return not is_timeout, str(event.get("lastTimestamp") or event.get("eventTime"))

    event = max(warnings, key=weight)
    message = str(event.get("message", ""))
    return _cause_of_missing(message) or Cause(str(event["reason"]), steady(message), False)


def _cause_of_missing(message: str) -> Cause | None:
    if found := re.search(r"find key (\S+) in (Secret|ConfigMap) \S+/(\S+)", message):
        key, kind, name = found.groups()
        text = f"The {kind} {name} has no key {key}; add it, or correct the spec that names it."
        return Cause(f"{kind}Missing", text, True)
    kinds = "|".join(map(re.escape, KINDS))
    found = re.search(rf'({kinds}) "([^"]+)" not found', message)
    if found is None:
        return None
    kind = KINDS[found[1]]
    text = f"The {kind} {found[2]} does not exist in this namespace; create it, or correct the spec"
    return Cause(f"{kind}Missing", f"{text} that names it.", True)


def _cause_of_image(image: str, detail: str) -> Cause:
    # The kubelet alternates between the error and "Back-off pulling …: the error"; the part that
    # both have is the cause.
    detail = re.sub(r'^Back-off pulling image "[^"]*":?\s*', "", detail)
    detail = re.sub(r"^(ErrImagePull|ImagePullBackOff):\s*", "", detail)
    text = f"The image {image} cannot be pulled; correct spec.engine.image or the registry. "
    return Cause("ImagePullFailed", text + detail, True)


def _cause_of_exit(spec: LLMServiceSpec, terminated: Manifest, restarts: int) -> Cause:
    message = str(terminated.get("message", ""))
    # Before the last words: the process that writes them may not know what killed its child.
    if terminated.get("reason") == "OOMKilled":
        limit = spec.resources.memory or "the limit of the namespace"
        text = f"The engine used more memory than it may ({limit}); raise spec.resources.memory."
        return Cause("OutOfMemory", text, True)
    if (words := parse_last_words(message)) is not None:
        reason, text = words[0], say_as_user(spec, *words)
        return Cause(reason, text, reason not in TRANSIENT_REASONS)
    code = terminated.get("exitCode")
    # No count of restarts either.
    tail = steady(message.strip())[-200:]
    if restarts >= CRASHES_UNTIL_STALLED:
        text = f"The engine ends again and again, with exit status {code}. Its last words: {tail}"
        return Cause("CrashLooping", text, True)
    return Cause("Restarting", f"The engine ended with exit status {code}: {tail}", False)


def _cause_of_deployment(deployment: Manifest, of_pods: Sequence[Cause]) -> Cause | None:
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return None
    failure = find_condition(status, "ReplicaFailure")
    if failure.get("status") == "True":
        return cause_of_refusal("PodsForbidden", str(failure.get("message", "")))
    if find_condition(status, "Progressing").get("reason") == "ProgressDeadlineExceeded":
        text = "The pods of this revision did not become ready in time."
        text = " ".join([text, *(cause.message for cause in of_pods[:1])])
        return Cause("ProgressDeadlineExceeded", text, True)
    return None
