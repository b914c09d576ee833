"""Objects as they were last read or written, as long as the watches tell of no other version.

A pass looks at the service and at each of its children, of which seldom more than one changed
since the last pass. What a watch misses, the resync finds; then it is read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from pagoda_operator.cluster import ApiServer
from pagoda_operator.names import ChildRef, Key, Manifest

# Read again after so long, whatever the watches tell.
TRUSTED_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    uid: str
    version: str
    since: float
    # As JSON: a tenth of the memory that the object takes.
    text: str


@dataclass(slots=True)
class Recall:
    """Reads objects by name, and remembers them.

    told: from kind and uid to the resourceVersion that a watch told last; None if it is not known,
        or known to be behind.
    """

    cluster: ApiServer
    told: Callable[[str, str], str | None]
    clock: Callable[[], float]
    _kept: dict[Key, dict[ChildRef, _Kept]] = field(default_factory=dict, init=False)

    async def get(self, key: Key, ref: ChildRef) -> Manifest | None:
        """The object, or None if there is none. Raises: ApiError."""
        kept = self._kept.get(key, {}).get(ref)
        if kept is not None and self._is_current(ref.kind, kept):
            return dict(json.loads(kept.text))
        found = await self.cluster.get(ref.kind, key.namespace, ref.name)
        if found is None:
            self.drop(key, ref)
        else:
            self.keep(key, found)
        return found

    def keep(self, key: Key, live: Manifest) -> None:
        """The object of the service is so: it was read, or is the answer to a write."""
        metadata, text = live["metadata"], json.dumps(live, separators=(",", ":"))
        kept = _Kept(metadata["uid"], metadata["resourceVersion"], self.clock(), text)
        self._kept.setdefault(key, {})[ChildRef.of(live)] = kept

    def drop(self, key: Key, ref: ChildRef) -> None:
        """The object is deleted, or about to be."""
        self._kept.get(key, {}).pop(ref, None)

    def forget(self, key: Key) -> None:
        """The service is gone, or what is known of it may be wrong."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Another operator may have written."""
        self._kept.clear()

    def _is_current(self, kind: str, kept: _Kept) -> bool:
        is_told = self.told(kind, kept.uid) == kept.version
        return is_told and self.clock() - kept.since < TRUSTED_SECONDS
