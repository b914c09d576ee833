"""What one pass of the reconciler read, and what only events tell of pods."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pagoda_operator.causes import events_of, is_unstarted
from pagoda_operator.cluster import ApiServer, Refused
from pagoda_operator.events import WARNINGS_OF_PODS, service_of
from pagoda_operator.names import LABEL_COMPONENT, LABEL_SERVICE, PRELOAD, ChildRef, Key, Manifest
from pagoda_operator.plan import is_ours
from pagoda_operator.queue import backoff_seconds
from pagoda_operator.recall import Recall
from pagoda_operator.spec import LLMService

logger = logging.getLogger(__name__)

# A pod without a container changes nothing in its status; only events tell what it waits for. They
# are looked at when one comes, and when the pod is 5, 10, 20 seconds old, and so on.
FIRST_LOOK_SECONDS = 5.0
LOOK_EVERY_SECONDS = 60.0
WATCH_SECONDS = 300.0
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
    """What `causes.events_of` asks for."""
    is_listed: bool
    """Whether children of any name were looked for."""

    def own(self, service: LLMService, ref: ChildRef) -> Manifest | None:
        """A child; None if it is missing or another's."""
        live = self.children.get(ref)
        return live if live is not None and is_ours(live, service) else None


async def observe(
    recall: Recall, key: Key, named: Collection[ChildRef], kinds: Collection[str], now: datetime
) -> World:
    """Read the children and pods of a service.

    An object of ours whose name the renderer does not give (any more) was applied before, or by
    an earlier operator, or for a service of this name that left it behind: to look for the
    latter once is enough, and never for a new service whose children are new as well.

    Args:
        named: children that are looked for by name.
        kinds: kinds, Pod among them, of which everything with the label of the service is listed.
    """
    cluster, namespace = recall.cluster, key.namespace
    selector = f"{LABEL_SERVICE}={key.name}"
    lists = await asyncio.gather(
        *(
            recall.list_pods(key) if kind == "Pod" else cluster.list(kind, namespace, selector)
            for kind in kinds
        )
    )
    listed = dict(zip(kinds, lists, strict=True))
    pods = listed.pop("Pod", [])
    children = {ChildRef.of(item): item for items in listed.values() for item in items}
    unseen = [ref for ref in named if ref not in children]
    found = await asyncio.gather(*(recall.get(key, ref) for ref in unseen))
    children |= {ref: item for ref, item in zip(unseen, found, strict=True) if item is not None}
    events = await _telling_events(cluster, namespace, pods, now)
    loaders = [pod for pod in pods if _is_loader(pod)]
    engines = [pod for pod in pods if not _is_loader(pod)]
    return World(children, engines, loaders, events, is_listed=bool(listed))


def _is_loader(pod: Manifest) -> bool:
    return bool(pod["metadata"].get("labels", {}).get(LABEL_COMPONENT) == PRELOAD)


async def _telling_events(
    cluster: ApiServer, namespace: str, pods: Sequence[Manifest], now: datetime
) -> list[Manifest]:
    """Events that say more of pods than their status; none where they may not be read."""
    asked = {
        pod["metadata"]["name"]: fields
        for pod in pods
        # Below 0 is a clock that goes wrong, which must not make the operator blind.
        if (fields := events_of(pod)) is not None
        and not (is_unstarted(pod) and 0 <= _age_seconds(pod, now) < FIRST_LOOK_SECONDS)
    }
    try:
        return await list_events(cluster, namespace, asked)
    except Refused:
        return []


async def watch_warnings(
    cluster: ApiServer, namespace: str | None, enqueue: Callable[[Key], None]
) -> None:
    """For ever, name each service of whose pod an event says why it does not start.

    Without it such pods are looked at less and less often.
    """
    failures, since = 0, ""
    while True:
        try:
            async for event in cluster.watch(
                "Event", namespace, WARNINGS_OF_PODS, since=since, seconds=WATCH_SECONDS
            ):
                failures, since = 0, event["metadata"]["resourceVersion"]
                if (key := service_of(event)) is not None:
                    enqueue(key)
        except Exception as error:
            failures, since = failures + 1, ""
            logger.warning("cannot watch events: %r", error)
        # Never without a pause, whatever closes the connection.
        await asyncio.sleep(backoff_seconds(failures + 1, random.random(), 1.0))


async def list_events(
    cluster: ApiServer, namespace: str, asked: Mapping[str, str]
) -> list[Manifest]:
    """Events about the first of these pods. Raises: ApiError.

    Args:
        asked: name of a pod → what else its events are chosen by.
    """
    chosen = itertools.islice(asked.items(), MAX_PODS_WITH_EVENTS)
    selectors = [f"involvedObject.name={name},{fields}" for name, fields in chosen]
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
