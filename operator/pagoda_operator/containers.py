"""Why a container was not created, ended or does not serve: from its state and events. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from pagoda_operator.cause import Cause, steady
from pagoda_operator.last_words import TRANSIENT_REASONS, parse_last_words, say_as_user
from pagoda_operator.names import Manifest, find_condition
from pagoda_operator.spec import LLMServiceSpec

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CREATE_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
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
# How an engine ends that SIGTERM or SIGKILL ended.
KILLED_EXIT_CODES = (0, 137, 143)


def cause_of_container(
    spec: LLMServiceSpec, pod: Manifest, status: Manifest, events: Sequence[Manifest]
) -> Cause | None:
    state = status.get("state", {})
    if (waiting := state.get("waiting", {})).get("reason") in IMAGE_REASONS:
        return _cause_of_image(str(status.get("image", "")), str(waiting.get("message", "")))
    if waiting.get("reason") in CREATE_REASONS:
        message = str(waiting.get("message", ""))
        text = f"{message}. Correct spec.engine.image or spec.podTemplate."
        return _cause_of_missing(message) or Cause(waiting["reason"], text, True)
    if ended := find_end(status):
        restarts = int(status.get("restartCount", 0))
        killed = _cause_of_killing(spec, pod, ended, restarts, events)
        return killed or _cause_of_exit(spec, ended, restarts)
    if "running" not in state:
        return None
    if status.get("started") and _was_ready(pod, state["running"]):
        text = (
            "The engine runs, but its readiness probe fails: it does not answer at /ready, or is "
            "about to end. The kubelet restarts it if /health fails too."
        )
        return Cause("NotReady", text, False)
    return Cause("LoadingModel", "The engine loads the model.", False)


def find_end(status: Manifest) -> Manifest:
    """How the container ended that does not run, or ran before this one; empty if none did."""
    state, last = status.get("state", {}), status.get("lastState", {})
    ended: Manifest = state.get("terminated") or last.get("terminated") or {}
    return ended


def _was_ready(pod: Manifest, running: Manifest) -> bool:
    """Whether the pod stopped being ready since its container runs."""
    since = find_condition(pod.get("status", {}), "Ready").get("lastTransitionTime")
    started = running.get("startedAt")
    if since is None or started is None:
        return False
    return datetime.fromisoformat(since) > datetime.fromisoformat(started)


def _cause_of_killing(
    spec: LLMServiceSpec,
    pod: Manifest,
    ended: Manifest,
    restarts: int,
    events: Sequence[Manifest],
) -> Cause | None:
    """Which probe made the kubelet end the container, if it was the kubelet's doing."""
    if ended.get("exitCode") not in KILLED_EXIT_CODES or ended.get("reason") == "OOMKilled":
        return None
    said = " ".join(
        str(event.get("message")) for event in _events_about(pod, events, ("Killing",))[-1:]
    )
    lifecycle = spec.lifecycle
    if "failed startup probe" in said:
        text = (
            "The engine had not started within spec.lifecycle.startupTimeoutSeconds "
            f"({lifecycle.startup_timeout_seconds}), and the kubelet restarted it; raise it."
        )
    elif "failed liveness probe" in said:
        stall = lifecycle.stall_seconds
        text = (
            "The engine did not answer at /health for a minute, or finished no step within "
            f"spec.lifecycle.stallSeconds ({stall or 'its default'}) while work was queued, and "
            "the kubelet restarted it; see its log (kubectl logs --previous)."
        )
    else:
        return None
    return Cause("ProbeFailed", text, restarts >= CRASHES_UNTIL_STALLED)


def _events_about(
    pod: Manifest, events: Sequence[Manifest], reasons: Sequence[str]
) -> list[Manifest]:
    """The latest last."""
    uid = pod["metadata"].get("uid")
    found = [
        event
        for event in events
        if event.get("involvedObject", {}).get("uid") == uid and event.get("reason") in reasons
    ]
    return sorted(found, key=_time_of)


def _time_of(event: Manifest) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def cause_of_warnings(pod: Manifest, events: Sequence[Manifest]) -> Cause | None:
    """Why the container is not created, from the latest warning that names a cause."""
    warnings = _events_about(pod, events, START_WARNINGS)
    if not warnings:
        return None

    def weight(event: Manifest) -> tuple[bool, str]:
        # That the kubelet gave up waiting is said in turn with what it waited for.
        message = str(event.get("message", ""))
        is_timeout = "timed out waiting" in message or "deadline exceeded" in message
        return not is_timeout, _time_of(event)

    event = max(warnings, key=weight)
    message = str(event.get("message", ""))
    text = f"{steady(message)}. The node tries again by itself; correct the volume or the node."
    return _cause_of_missing(message) or Cause(str(event["reason"]), text, False)


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
        reason, text = words[0], steady(say_as_user(spec, *words))
        return Cause(reason, text, reason not in TRANSIENT_REASONS)
    code = terminated.get("exitCode")
    # No count of restarts either.
    tail = steady(message.strip())[-200:]
    if restarts >= CRASHES_UNTIL_STALLED:
        text = (
            f"The engine ends again and again, with exit status {code}; see its log (kubectl logs "
            f"--previous). It ends with: {tail}"
        )
        return Cause("CrashLooping", text, True)
    return Cause("Restarting", f"The engine ended with exit status {code}: {tail}", False)
