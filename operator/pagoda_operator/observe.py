"""What one pass of the reconciler read, and what only events tell of pods."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from pagoda_operator.causes import is_unstarted
from pagoda_operator.cluster import ApiServer, Refused
from pagoda_operator.names import LABEL_COMPONENT, LABEL_SERVICE, PRELOAD, ChildRef, Key, Manifest
from pagoda_operator.plan import is_ours
from pagoda_operator.spec import LLMService

# A pod without a container changes nothing in its status; only events tell what it waits for. They
# are looked at when the pod is 5, 10, 20 seconds old, and so on.
FIRST_LOOK_SECONDS = 5.0
LOOK_EVERY_SECONDS = 60.0
# One pod's trouble is mostly that of all.
MAX_PODS_WITH_EVENTS = 3


@dataclass(frozen=True, slots=True)
class World:
    """What one pass read."""

    children: dict[ChildRef, Manifest]
    pods: list[Manifest]
    """Of engines."""
    loaders: list[Manifest]
    """Pods that fill a claim."""
    events: list[Manifest]
    """Warnings about pods that do not start."""
    is_listed: bool
    """Whether children of any name were looked for."""

    def own(self, service: LLMService, ref: ChildRef) -> Manifest | None:
        """A child; None if it is missing or another's."""
        live = self.children.get(ref)
        return live if live is not None and is_ours(live, service) else None


async def observe(
    cluster: ApiServer, key: Key, named: Collection[ChildRef], kinds: Collection[str], now: datetime
) -> World:
    """Read the children and pods of a service.

    An object of ours whose name the renderer does not give (any more) was applied before, or by
    an earlier operator, or for a service of this name that left it behind: to look for the
    latter once is enough, and never for a new service whose children are new as well.

    Args:
        named: children that are looked for by name.
        kinds: kinds, Pod among them, of which everything with the label of the service is listed.
    """
    namespace, selector = key.namespace, f"{LABEL_SERVICE}={key.name}"
    lists = await asyncio.gather(*(cluster.list(kind, namespace, selector) for kind in kinds))
    listed = dict(zip(kinds, lists, strict=True))
    pods = listed.pop("Pod", [])
    children = {ChildRef.of(item): item for items in listed.values() for item in items}
    unseen = [ref for ref in named if ref not in children]
    found = await asyncio.gather(*(cluster.get(ref.kind, namespace, ref.name) for ref in unseen))
    children |= {ref: item for ref, item in zip(unseen, found, strict=True) if item is not None}
    events = await _warnings_of_unstarted(cluster, namespace, pods, now)
    loaders = [pod for pod in pods if _is_loader(pod)]
    engines = [pod for pod in pods if not _is_loader(pod)]
    return World(children, engines, loaders, events, is_listed=bool(listed))


def _is_loader(pod: Manifest) -> bool:
    return bool(pod["metadata"].get("labels", {}).get(LABEL_COMPONENT) == PRELOAD)


async def _warnings_of_unstarted(
    cluster: ApiServer, namespace: str, pods: Sequence[Manifest], now: datetime
) -> list[Manifest]:
    """Warning events about pods that do not start; none where they may not be read."""
    unstarted = [
        pod
        for pod in pods
        # Below 0 is a clock that goes wrong, which must not make the operator blind.
        if is_unstarted(pod) and not 0 <= _age_seconds(pod, now) < FIRST_LOOK_SECONDS
    ]
    try:
        return await list_warnings(cluster, namespace, unstarted)
    except Refused:
        return []


async def list_warnings(
    cluster: ApiServer, namespace: str, pods: Sequence[Manifest]
) -> list[Manifest]:
    """Warning events about the first of these pods. Raises: ApiError."""
    names = [pod["metadata"]["name"] for pod in pods[:MAX_PODS_WITH_EVENTS]]
    selectors = [f"involvedObject.name={name},type=Warning" for name in names]
    found = await asyncio.gather(
        *(cluster.list("Event", namespace, fields=selector) for selector in selectors)
    )
    return [event for events in found for event in events]


def seconds_to_next_look(pods: Sequence[Manifest], now: datetime) -> float | None:
    """When to look at the events of pods that do not start; None if all of them did."""
    ages = [_age_seconds(pod, now) for pod in pods if is_unstarted(pod)]
    if not ages:
        return None
    return min(max(min(ages), FIRST_LOOK_SECONDS), LOOK_EVERY_SECONDS)


def _age_seconds(pod: Manifest, now: datetime) -> float:
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return (now - created).total_seconds()
