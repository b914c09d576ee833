"""What the watches missed: what they told is compared with lists, again and again.

kopf does not report a deletion that falls between two watches, and a watch may stand still without
an error. A version that is listed, and that no watch tells within a few seconds, means either:
then the service is reconciled at once, and a watch that stays behind ends the operator, which
begins anew. A look costs a list of the metadata of each kind, and a pass only of what was missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from pagoda_operator.cluster import ApiServer
from pagoda_operator.names import (
    KIND,
    LABEL_MANAGED_BY,
    LABEL_SERVICE,
    MANAGED_BY,
    OPTIONAL_KINDS,
    WATCHED_KINDS,
    Key,
)
from pagoda_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

# How long a watch may take to tell what a list has.
GRACE_SECONDS = 5.0
# kopf renews a watch that gave no sign of life for 70 s.
DEAD_SECONDS = 150.0


def selector_of(kind: str) -> str:
    """What objects of the kind are watched and listed by."""
    if kind == KIND:
        return ""
    # The label by which the pods of a service are found: others may change what they do not use.
    return LABEL_SERVICE if kind == "Pod" else f"{LABEL_MANAGED_BY}={MANAGED_BY}"


@dataclass(frozen=True, slots=True)
class Sighting:
    """An object as it was told of, and the services that it is, belongs to, or should."""

    version: str
    keys: tuple[Key, ...]

    @classmethod
    def of(cls, kind: str, metadata: Mapping[str, Any]) -> Sighting:
        names = {metadata["name"]} if kind == KIND else owners(metadata)
        namespace = metadata["namespace"]
        return cls(
            metadata["resourceVersion"], tuple(Key(namespace, name) for name in sorted(names))
        )


def owners(metadata: Mapping[str, Any]) -> set[str]:
    """The LLMServices that a child or a pod names: by its owner and by its label.

    They differ if somebody edited one of them. A pod's owner is a ReplicaSet; it has the label.
    """
    names = {
        owner["name"] for owner in metadata.get("ownerReferences", []) if owner["kind"] == KIND
    }
    if label := metadata.get("labels", {}).get(LABEL_SERVICE):
        names.add(label)
    return names


Sightings = dict[str, Sighting]
"""Objects of one kind by uid."""


@dataclass(slots=True)
class Resync:
    """What was told of every object that is there, and how to find what was not."""

    cluster: ApiServer
    telemetry: Telemetry
    enqueue: Callable[[Key], None]
    _: KW_ONLY
    forget: Callable[[Key], None]
    """What is remembered of a service may be wrong: no watch told of a change."""
    namespace: str | None
    clock: Callable[[], float]
    _seen: dict[str, Sightings] = field(
        default_factory=lambda: {kind: {} for kind in (*WATCHED_KINDS, *OPTIONAL_KINDS)}, init=False
    )
    _num_told: Counter[str] = field(default_factory=Counter, init=False)
    _behind_since: dict[str, float] = field(default_factory=dict, init=False)
    _doubted: dict[str, set[str]] = field(default_factory=dict, init=False)
    """uids of which the last list had what no watch told yet."""

    def note(self, kind: str, metadata: Mapping[str, Any], *, is_gone: bool) -> tuple[Key, ...]:
        """Take what a watch tells; its events of one object come in order. Returns whose it is."""
        sighting = Sighting.of(kind, metadata)
        self._num_told[kind] += 1
        self._doubted.get(kind, set()).discard(metadata["uid"])
        if is_gone:
            self._seen[kind].pop(metadata["uid"], None)
        else:
            self._seen[kind][metadata["uid"]] = sighting
        return sighting.keys

    def told(self, kind: str, uid: str) -> str | None:
        """The version of an object that was told last; None if a list had another one, or if no
        watch tells of the kind."""
        if kind in OPTIONAL_KINDS or uid in self._doubted.get(kind, ()):
            return None
        sighting = self._seen[kind].get(uid)
        return None if sighting is None else sighting.version

    async def look(self, served: Collection[str]) -> list[Key]:
        """Enqueue what no watch told of. Returns the keys of all services.

        Args:
            served: those of OPTIONAL_KINDS that there are. Nobody watches them: a look is how
                changes are noticed.
        Raises:
            ApiError: there is no list; then nothing is known of the watches.
        """
        self._behind_since, behind_before = {}, self._behind_since
        at, num_told = self.clock(), Counter(self._num_told)
        before, listed = {}, {}
        for kind in (*WATCHED_KINDS, *served):
            before[kind] = dict(self._seen[kind])
            listed[kind] = await self._list(kind)
        for kind in served:
            changed = _differing(before[kind], listed[kind])
            for key in _keys_of(changed, before[kind], listed[kind]):
                self.enqueue(key)
            self._seen[kind] = listed[kind]
        if any(_differing(before[kind], listed[kind]) for kind in WATCHED_KINDS):
            await asyncio.sleep(GRACE_SECONDS)
        for kind in WATCHED_KINDS:
            # A watch that tells anything lives, however far this process is behind it.
            is_silent = self._num_told[kind] == num_told[kind]
            if self._find_missed(kind, before[kind], listed[kind], is_silent):
                self._behind_since[kind] = behind_before.get(kind, at)
            since = self._behind_since.get(kind)
            age = 0.0 if since is None else self.clock() - since
            self.telemetry.watch_age.labels(kind=kind).set(age)
        return [key for sighting in listed[KIND].values() for key in sighting.keys]

    async def list_services(self) -> list[Key]:
        """The keys of all services. Raises: ApiError."""
        return [key for sighting in (await self._list(KIND)).values() for key in sighting.keys]

    def find_dead(self) -> str | None:
        """A kind whose watch stands still although the API server answers."""
        now = self.clock()
        dead = (kind for kind, since in self._behind_since.items() if now - since >= DEAD_SECONDS)
        return next(dead, None)

    async def _list(self, kind: str) -> Sightings:
        found = await self.cluster.list_metadata(kind, self.namespace, selector_of(kind))
        return {metadata["uid"]: Sighting.of(kind, metadata) for metadata in found}

    def _find_missed(
        self, kind: str, before: Sightings, listed: Sightings, is_silent: bool
    ) -> bool:
        """Enqueue what was not told of a kind; whether its watch is behind."""
        seen = self._seen[kind]
        # What was told of since the list began was not missed, whatever version that was.
        untold = {uid for uid in _differing(before, listed) if seen.get(uid) == before.get(uid)}
        self._doubted[kind] = untold & listed.keys()
        for key in _keys_of(untold, before, listed):
            self.forget(key)
            self.enqueue(key)
        missed = untold if is_silent else untold - listed.keys()
        for uid in missed - listed.keys():
            # No watch will ever tell that it is gone.
            del seen[uid]
        if missed:
            self.telemetry.resync_drift.labels(kind=kind).inc(len(missed))
            logger.warning("%d changes of kind %s were told by no watch", len(missed), kind)
        return not missed.isdisjoint(listed)


def _keys_of(uids: Collection[str], *sightings: Sightings) -> set[Key]:
    return {key for uid in uids for it in sightings if uid in it for key in it[uid].keys}


def _differing(before: Sightings, listed: Sightings) -> set[str]:
    """Objects of which a list has another version than was told, or has not, or alone has."""
    return {uid for uid in before.keys() | listed.keys() if before.get(uid) != listed.get(uid)}
