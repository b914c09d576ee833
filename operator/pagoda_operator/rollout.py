"""How changed pods replace the ones that run, and on which of the operator's images they run. Pure.

`rollout.strategy: Auto` is a surge: a new engine is ready before an old one ends. Whether there is
room for it only the scheduler knows (a cluster may get another node for it), and it says so of the
new pod itself. Where that lasts, an old engine ends first, if its end surely makes the room: what
serves is never given up for a pod that may fit nowhere. All of it is read from the pods and the
Deployment, so that a restart forgets nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction

from pagoda_operator.causes import is_living, is_unstarted
from pagoda_operator.names import (
    ANNOTATION_IMAGE,
    LABEL_REVISION,
    Manifest,
    find_condition,
)
from pagoda_operator.pod import ENGINE
from pagoda_operator.render import render_deployment, revision_of
from pagoda_operator.spec import LLMService, Strategy

ROOM_SECONDS = 120.0
"""For how long a new pod may find no room until an old one ends: a cluster adds a node in less."""
# What a scheduler says where the end of an old pod can help.
_NO_ROOM = (
    "Insufficient",
    "Too many pods",
    "cannot allocate all claims",
    "anti-affinity",
    "topology spread",
    "ReadWriteOncePod",
)
# Where a pod may go; its room is that of an old one only if both say the same.
_PLACES = (
    "nodeSelector",
    "affinity",
    "tolerations",
    "topologySpreadConstraints",
    "resourceClaims",
    "runtimeClassName",
    "schedulerName",
)
_HASH = "pod-template-hash"
_UNITS = {"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "": Fraction(1)}
_UNITS |= {unit: Fraction(1000**power) for power, unit in enumerate("kMGTPE", 1)}
_UNITS |= {f"{unit}i": Fraction(1024**power) for power, unit in enumerate("KMGTPE", 1)}

PREFERRED = "A new engine is ready before an old one ends."
AS_SPECIFIED = "spec.rollout.strategy says so."
NO_ROOM = "There was no room for a new engine beside the old ones: they end first, one at a time."
WAITING = (
    "There is no room for a new engine beside the old ones yet; where that lasts for "
    f"{ROOM_SECONDS:.0f} s, they end first, one at a time."
)
NO_HELP = (
    "There is no room for a new engine, and the end of an old one, which asked for less or for "
    "other nodes, may not make it: the old ones serve on. Make room, or choose InPlace or Recreate."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The choice for one service now.

    image: of engines whose spec names none. newer_image: the operator's, where pods keep another.
    next_look_seconds: when the choice may be another one though nothing changed.
    """

    image: str
    newer_image: str | None = None
    strategy: Strategy
    reason: str
    message: str
    next_look_seconds: float | None = None

    def fields(self) -> Manifest:
        """`status.rollout`."""
        newer = {} if self.newer_image is None else {"newerImage": self.newer_image}
        told = {"strategy": self.strategy, "reason": self.reason, "message": self.message}
        return told | newer


def choose_rollout(
    service: LLMService,
    deployment: Manifest | None,
    pods: Sequence[Manifest],
    events: Sequence[Manifest],
    *,
    default_image: str,
    now: datetime,
) -> Rollout:
    """The choice.

    Args:
        deployment: the live one of this service.
        events: warnings about the pods that `causes.is_unstarted`.
        default_image: the operator's.
        now: in UTC.
    """
    image, asked = _choose_image(service, deployment, default_image), service.spec.rollout.strategy
    is_older = image != default_image and service.spec.engine.image is None
    rollout = Rollout(
        image=image,
        newer_image=default_image if is_older else None,
        strategy="Surge",
        reason="Preferred",
        message=PREFERRED,
    )
    if asked != "Auto":
        return replace(rollout, strategy=asked, reason="AsSpecified", message=AS_SPECIFIED)
    wanted = revision_of(render_deployment(service, engine_image=image))
    if deployment is None or revision_of(deployment) != wanted:
        return rollout
    status = deployment.get("status", {})
    is_seen = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    is_under_way = status.get("replicas", 0) > status.get("updatedReplicas", 0)
    in_place = replace(rollout, strategy="InPlace", reason="NoRoom", message=NO_ROOM)
    if _is_in_place(deployment) and (is_under_way or not is_seen):
        return in_place
    waits = list(_find_waits(deployment, pods, events)) if is_under_way and is_seen else []
    if not waits:
        return rollout
    if not status.get("readyReplicas"):
        return in_place
    since = [wait.since for wait in waits if wait.is_helped]
    if not since:
        return replace(rollout, reason="NoRoomInPlace", message=NO_HELP)
    left = ROOM_SECONDS - (now - min(since)).total_seconds()
    if left <= 0:
        return in_place
    waiting = replace(rollout, reason="WaitingForRoom", message=WAITING)
    return replace(waiting, next_look_seconds=min(left, ROOM_SECONDS))


def _choose_image(service: LLMService, deployment: Manifest | None, default_image: str) -> str:
    """The image that the pods were given, as long as nothing else of them changes."""
    if deployment is None or service.spec.engine.image_policy == "Follow":
        return default_image
    annotations = deployment["metadata"].get("annotations", {})
    # An operator that wrote no such annotation gave its image to pods whose spec names none.
    kept = annotations.get(ANNOTATION_IMAGE) or _image_of(deployment)
    if not kept or kept == default_image:
        return default_image
    revision = revision_of(render_deployment(service, engine_image=kept))
    return kept if revision == revision_of(deployment) else default_image


def _image_of(deployment: Manifest) -> str:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next((str(it["image"]) for it in containers if it["name"] == ENGINE), "")


def _is_in_place(deployment: Manifest) -> bool:
    rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate") or {}
    return bool(rolling.get("maxSurge") == 0)


@dataclass(frozen=True, slots=True)
class _Wait:
    """For room of a new pod: since when, and whether the end of an old one surely makes it."""

    since: datetime
    is_helped: bool


def _find_waits(
    deployment: Manifest, pods: Sequence[Manifest], events: Sequence[Manifest]
) -> Iterator[_Wait]:
    """Of the new pods whose room old ones hold, or may hold."""
    living = [pod for pod in pods if is_living(pod)]
    revision = revision_of(deployment)
    for pod in living:
        # `kubectl rollout restart` makes new pods of the same revision.
        old = [it for it in living if _label(it, _HASH) != _label(pod, _HASH)]
        if not old or _label(pod, LABEL_REVISION) != revision:
            continue
        scheduled = find_condition(pod.get("status", {}), "PodScheduled")
        since = scheduled.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
        if since is None:
            continue
        if _lacks_node(pod, scheduled):
            held = [it["spec"] for it in old if "nodeName" in it["spec"]]
            is_helped = any(_has_room_of(it, pod["spec"]) for it in held)
            yield _Wait(datetime.fromisoformat(since), is_helped)
        elif is_unstarted(pod) and _lacks_volume(pod, events):
            yield _Wait(datetime.fromisoformat(since), True)
    failure = find_condition(deployment.get("status", {}), "ReplicaFailure")
    if failure.get("status") == "True" and "exceeded quota" in failure.get("message", ""):
        template = deployment["spec"]["template"]["spec"]
        is_helped = any(_asks_for_as_much(it["spec"], template) for it in living)
        yield _Wait(datetime.fromisoformat(failure["lastTransitionTime"]), is_helped)


def _label(pod: Manifest, name: str) -> str:
    return str(pod["metadata"].get("labels", {}).get(name, ""))


def _lacks_node(pod: Manifest, scheduled: Manifest) -> bool:
    if scheduled.get("status") != "False":
        return False
    if scheduled.get("reason") == "SchedulingGated":
        # The quota of a queue, which old pods use up.
        gates = pod["spec"].get("schedulingGates", [])
        return any(gate["name"].startswith("kueue.x-k8s.io/") for gate in gates)
    return any(words in scheduled.get("message", "") for words in _NO_ROOM)


def _lacks_volume(pod: Manifest, events: Sequence[Manifest]) -> bool:
    """Whether its node waits for a volume that a pod of another node has (ReadWriteOnce)."""
    uid = pod["metadata"].get("uid")
    return any(
        event.get("involvedObject", {}).get("uid") == uid
        and event.get("reason") == "FailedAttachVolume"
        and "Multi-Attach" in event.get("message", "")
        for event in events
    )


def _has_room_of(old: Manifest, new: Manifest) -> bool:
    """Whether a pod surely fits where another one ends."""
    is_same_place = all((old.get(name) or None) == (new.get(name) or None) for name in _PLACES)
    return is_same_place and _asks_for_as_much(old, new)


def _asks_for_as_much(old: Manifest, new: Manifest) -> bool:
    held = _requests(old)
    return all(amount <= held.get(name, 0) for name, amount in _requests(new).items())


def _requests(pod: Manifest) -> dict[str, Fraction]:
    """What the containers of a pod reserve, together."""
    sums: dict[str, Fraction] = {}
    for container in pod["containers"]:
        for name, amount in container.get("resources", {}).get("requests", {}).items():
            sums[name] = sums.get(name, Fraction(0)) + _parse_quantity(str(amount))
    return sums


def _parse_quantity(text: str) -> Fraction:
    """A quantity as the API server writes it: 1500m, 2Gi, 1e3."""
    found = re.fullmatch(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)([a-zA-Z]*)", text)
    assert found is not None, f"the API server knows no quantity {text}"
    return Fraction(found[1]) * _UNITS[found[2]]
