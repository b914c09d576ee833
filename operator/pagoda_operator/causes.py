"""Why a pod does not serve: from the state of pods and Deployment to one cause. Pure.

Only pods of the current revision count, and only as long as they are not ready: a cause is gone
as soon as its pod is gone or well, so that a corrected spec clears it by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda_operator.flags import model_claim
from pagoda_operator.names import LABEL_REVISION, Manifest
from pagoda_operator.spec import LLMServiceSpec

# Contract with the runtime: the reasons of its last words (`tests/contract`).
FATAL_REASONS = (
    "ModelNotFound",
    "ModelAccessDenied",
    "UnsupportedArchitecture",
    "CorruptWeights",
    "QuantizationMismatch",
    "InvalidModelConfig",
    "DoesNotFit",
    "OutOfMemory",
    "GpuOutOfMemory",
    "KvCacheTooSmall",
    "NcclInitFailed",
    "RankDied",
    "DiskFull",
    "InvalidFlags",
)
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CRASHES_UNTIL_STALLED = 3
MAX_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the service is not what its spec asks for; `is_stalled` if a person has to act."""

    reason: str
    message: str
    is_stalled: bool


def find_cause(
    spec: LLMServiceSpec, deployment: Manifest, pods: Sequence[Manifest], revision: str
) -> Cause | None:
    """The cause that weighs most, or None if nothing is known to be wrong."""
    current = [
        pod
        for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))
        if pod["metadata"].get("labels", {}).get(LABEL_REVISION) == revision
        and "deletionTimestamp" not in pod["metadata"]
        and pod.get("status", {}).get("phase") in ("Pending", "Running", "Unknown")
        and not is_ready(pod)
    ]
    causes = [cause for pod in current if (cause := _cause_of_pod(spec, pod)) is not None]
    if (cause := _cause_of_deployment(deployment)) is not None:
        causes.append(cause)
    # min keeps the first of equals, and pods are in order: the same state gives the same words.
    return min(causes, key=lambda cause: not cause.is_stalled, default=None)


def is_ready(pod: Manifest) -> bool:
    """Whether the pod answers requests, as the kubelet sees it."""
    return _condition(pod, "Ready").get("status") == "True"


def _condition(manifest: Manifest, kind: str) -> Manifest:
    conditions: list[Manifest] = manifest.get("status", {}).get("conditions", [])
    return next((entry for entry in conditions if entry.get("type") == kind), {})


def _cause_of_pod(spec: LLMServiceSpec, pod: Manifest) -> Cause | None:
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return _cause_of_unscheduled(spec, str(scheduled.get("message", "")))
    for status in pod.get("status", {}).get("containerStatuses", []):
        state, last = status.get("state", {}), status.get("lastState", {})
        if (waiting := state.get("waiting", {})).get("reason") in IMAGE_REASONS:
            return _cause_of_image(str(status.get("image", "")), str(waiting.get("message", "")))
        if waiting.get("reason") in ("CreateContainerConfigError", "CreateContainerError"):
            return Cause(waiting["reason"], _shorten(str(waiting.get("message", ""))), True)
        terminated = state.get("terminated") or last.get("terminated")
        if terminated:
            return _cause_of_exit(spec, terminated, int(status.get("restartCount", 0)))
        if "running" in state:
            return Cause("LoadingModel", "The engine loads the model.", False)
    return None


def _cause_of_unscheduled(spec: LLMServiceSpec, message: str) -> Cause:
    resource = spec.resources.gpu.resource_name
    if f"Insufficient {resource}" in message:
        text = f"No node has {spec.num_gpus} free {resource}. The scheduler says: {message}"
        return Cause("InsufficientGPU", _shorten(text), False)
    claim = model_claim(spec.model.uri)
    if claim and f'persistentvolumeclaim "{claim}" not found' in message:
        text = f"The PersistentVolumeClaim {claim} of spec.model.uri does not exist in this "
        return Cause("ModelNotFound", text + "namespace; create it, or correct the uri.", True)
    return Cause("Unschedulable", _shorten(f"The scheduler says: {message}"), False)


def _cause_of_image(image: str, detail: str) -> Cause:
    # The kubelet alternates between the error and "Back-off pulling …: the error"; the part that
    # both have is the cause.
    detail = re.sub(r'^Back-off pulling image "[^"]*":?\s*', "", detail)
    detail = re.sub(r"^(ErrImagePull|ImagePullBackOff):\s*", "", detail)
    text = f"The image {image} cannot be pulled; correct spec.engine.image or the registry. "
    return Cause("ImagePullFailed", _shorten(text + detail), True)


def _cause_of_exit(spec: LLMServiceSpec, terminated: Manifest, restarts: int) -> Cause:
    message = str(terminated.get("message", ""))
    if (words := parse_last_words(message)) is not None:
        return Cause(words[0], _shorten(words[1]), True)
    code = terminated.get("exitCode")
    if terminated.get("reason") == "OOMKilled":
        limit = spec.resources.memory or "the limit of the namespace"
        text = f"The engine used more memory than it may ({limit}); raise spec.resources.memory."
        return Cause("OutOfMemory", text, True)
    tail = message.strip()[-200:]
    if restarts >= CRASHES_UNTIL_STALLED:
        # No count of restarts: it would be a write at every crash.
        text = f"The engine ends again and again, with exit status {code}. Its last words: {tail}"
        return Cause("CrashLooping", text, True)
    return Cause("Restarting", f"The engine ended with exit status {code}: {tail}", False)


def parse_last_words(message: str) -> tuple[str, str] | None:
    """Reason and message of the JSON line in a termination log; None if there is none."""
    for line in reversed(message.splitlines()):
        try:
            words = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(words, dict) and words.get("reason") in FATAL_REASONS:
            return str(words["reason"]), str(words.get("message", ""))
    return None


def _cause_of_deployment(deployment: Manifest) -> Cause | None:
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return None
    failure = _condition(deployment, "ReplicaFailure")
    if failure.get("status") == "True":
        message = _shorten(str(failure.get("message", "")))
        reason = "QuotaExceeded" if "exceeded quota" in message else "PodsForbidden"
        return Cause(reason, message, True)
    if _condition(deployment, "Progressing").get("reason") == "ProgressDeadlineExceeded":
        text = "The pods of this revision did not become ready in time."
        return Cause("ProgressDeadlineExceeded", text, True)
    return None


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
