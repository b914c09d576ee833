"""What one pass of the reconciler read, and what only events tell of pods."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pagoda_operator.causes import is_unstarted
from pagoda_operator.cluster import Cluster, Refused
from pagoda_operator.names import ChildRef, Manifest
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
    events: list[Manifest]
    """Warnings about pods that do not start."""
    is_listed: bool
    """Whether children of any name were looked for."""

    def own(self, service: LLMService, ref: ChildRef) -> Manifest | None:
        """A child; None if it is missing or another's."""
        live = self.children.get(ref)
        return live if live is not None and is_ours(live, service) else None


async def list_warnings(
    cluster: Cluster, namespace: str, pods: Sequence[Manifest], now: datetime
) -> list[Manifest]:
    """Warning events about pods that do not start; none where they may not be read."""
    names = [
        pod["metadata"]["name"]
        for pod in pods
        # Below 0 is a clock that goes wrong, which must not make the operator blind.
        if is_unstarted(pod) and not 0 <= _age_seconds(pod, now) < FIRST_LOOK_SECONDS
    ]
    selectors = [f"involvedObject.name={name},type=Warning" for name in names]
    try:
        found = await asyncio.gather(
            *(
                cluster.list("Event", namespace, fields=selector)
                for selector in selectors[:MAX_PODS_WITH_EVENTS]
            )
        )
    except Refused:
        return []
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
