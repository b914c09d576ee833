"""Objects as they were last told of, read or written: what a watch tells is not asked for again.

A pass looks at the service, its children and its pods, of which seldom more than one changed since
the last pass. What a watch misses, the resync finds; then it is read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pagoda_operator.cluster import ApiServer
from pagoda_operator.names import LABEL_SERVICE, ChildRef, Key, Manifest

# Read again after so long, whatever the watches tell: by the pass that each service has once an
# hour, and seldom by one that an edit waits for.
TRUSTED_SECONDS = 3500.0


@dataclass(frozen=True, slots=True)
class _Kept:
    uid: str
    version: str
    since: float
    # As JSON: a tenth of the memory that the object takes.
    text: str


@dataclass(slots=True)
class _Service:
    objects: dict[ChildRef, _Kept] = field(default_factory=dict)
    pods_listed_at: float | None = None
    """When all of its pods were; the watch tells of those that came and went since then."""


@dataclass(slots=True)
class Recall:
    """Reads objects of services, and remembers them.

    told: from kind and uid to the resourceVersion that a watch told last; None if it is not known,
        or known to be behind. Without it everything is read each time.
    """

    cluster: ApiServer
    told: Callable[[str, str], str | None] | None
    clock: Callable[[], float]
    _services: dict[Key, _Service] = field(default_factory=dict, init=False)
    _floors: dict[str, str] = field(default_factory=dict, init=False)
    """By kind, the newest version that was forgotten: events of older ones may still come."""

    async def get(self, key: Key, ref: ChildRef) -> Manifest | None:
        """The object, or None if there is none. Raises: ApiError."""
        kept = self._find(key, ref)
        if kept is not None and self._is_current(ref.kind, kept):
            return dict(json.loads(kept.text))
        found = await self.cluster.get(ref.kind, key.namespace, ref.name)
        if found is None:
            self.drop(key, ref)
        else:
            self.keep(key, found)
        return found

    async def list_pods(self, key: Key) -> list[Manifest]:
        """The pods with the label of the service, by name. Raises: ApiError."""
        service = self._services.setdefault(key, _Service())
        kept = dict(_pods_of(service))
        if self._is_trusted(service.pods_listed_at) and all(
            self._is_current("Pod", it) for it in kept.values()
        ):
            return [json.loads(kept[name].text) for name in sorted(kept)]
        listed_at, selector = self.clock(), f"{LABEL_SERVICE}={key.name}"
        found = await self.cluster.list("Pod", key.namespace, selector)
        if self._services.get(key) is service:
            # What a watch told while the list was on its way stays.
            for name in kept.keys() - {pod["metadata"]["name"] for pod in found}:
                if self._find(key, ref := ChildRef("Pod", name)) is kept[name]:
                    self.drop(key, ref)
            for pod in found:
                self.keep(key, pod)
            service.pods_listed_at = listed_at
        return found

    def note(self, key: Key, live: Manifest, *, is_gone: bool) -> None:
        """A watch tells of an object of the service."""
        ref, metadata = ChildRef.of(live), live["metadata"]
        if ref.kind == "Pod" and metadata.get("labels", {}).get(LABEL_SERVICE) != key.name:
            # Told of for its owner, it would not be in a list.
            return
        kept, version = self._find(key, ref), metadata["resourceVersion"]
        if not is_gone:
            if not _is_newer(self._floors.get(ref.kind, version), version):
                self.keep(key, live)
        elif kept is not None and kept.uid == metadata["uid"]:
            self.drop(key, ref)

    def keep(self, key: Key, live: Manifest) -> None:
        """The object of the service is so, or was, if something newer is known of it."""
        ref, metadata = ChildRef.of(live), live["metadata"]
        kept = self._find(key, ref)
        if kept is None or not _is_newer(kept.version, metadata["resourceVersion"]):
            text = json.dumps(live, separators=(",", ":"))
            kept = _Kept(metadata["uid"], metadata["resourceVersion"], self.clock(), text)
            self._services.setdefault(key, _Service()).objects[ref] = kept

    def drop(self, key: Key, ref: ChildRef) -> None:
        """The object is deleted, or about to be."""
        if (service := self._services.get(key)) is not None:
            service.objects.pop(ref, None)

    def forget(self, key: Key) -> None:
        """The service is gone, or what is known of it may be wrong."""
        service = self._services.pop(key, _Service())
        for ref, kept in service.objects.items():
            if _is_newer(kept.version, self._floors.get(ref.kind, "0")):
                self._floors[ref.kind] = kept.version

    def clear(self) -> None:
        """Another operator may have written."""
        for key in list(self._services):
            self.forget(key)

    def _find(self, key: Key, ref: ChildRef) -> _Kept | None:
        service = self._services.get(key)
        return None if service is None else service.objects.get(ref)

    def _is_current(self, kind: str, kept: _Kept) -> bool:
        told = None if self.told is None else self.told(kind, kept.uid)
        if told is None or not self._is_trusted(kept.since):
            return False
        # An answer to a write is newer than what a watch has told yet.
        return not _is_newer(told, kept.version)

    def _is_trusted(self, since: float | None) -> bool:
        if since is None or self.told is None:
            return False
        return self.clock() - since < TRUSTED_SECONDS


def _pods_of(service: _Service) -> Iterator[tuple[str, _Kept]]:
    return ((ref.name, it) for ref, it in service.objects.items() if ref.kind == "Pod")


def _is_newer(version: str, than: str) -> bool:
    """Versions of etcd are numbers that grow; of others it is only known whether they differ."""
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
