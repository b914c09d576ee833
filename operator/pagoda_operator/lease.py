"""One operator for one object: a Lease says who serves a namespace, and another who serves all.

An operator of one namespace holds the Lease `pagoda-operator` there, a cluster-wide one the Lease
`pagoda-operator-cluster` in `default`. A second operator of the same reach stands by until the
first is gone; a cluster-wide one leaves alone the namespaces that have an operator of their own.
Whether a holder lives is judged by this process's own clock: a Lease is dead when it was seen
unchanged for as long as it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pagoda_operator.cluster import ApiError, ApiServer, Conflict, NotFound, Refused
from pagoda_operator.names import GROUP, Manifest

logger = logging.getLogger(__name__)

DURATION_SECONDS = 15
RENEW_SECONDS = 5.0
# With the duration, how long nobody serves after a leader that was lost: 20 s must be enough.
RETRY_SECONDS = 1.0
# What a cluster-wide operator knows of a namespace that has an operator of its own.
BELIEVED_SECONDS = 5.0
# That it has none, for a burst of passes in the namespace.
FREE_SECONDS = 2.0
NAME = "pagoda-operator"
CLUSTER_NAME = "pagoda-operator-cluster"
CLUSTER_NAMESPACE = "default"
ANNOTATION_REPLICA_OF = f"{GROUP}/replica-of"
"""What the replicas of one installation have in common."""


def own_identity() -> str:
    return f"{socket.gethostname()}_{os.getpid()}"


def is_dead_here(holder: str) -> bool:
    """Whether the holder was a process of this host, or of this pod, that is no more."""
    host, _, pid = holder.rpartition("_")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    # This process holds nothing yet: an earlier one had its number.
    return int(pid) == os.getpid()


@dataclass(slots=True)
class Sightings:
    """When each Lease was last seen to change; every time is an argument."""

    _seen: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    def holder(self, lease: Manifest | None, now: float) -> str | None:
        """Who holds the Lease and lives, as far as it can be told; None if nobody."""
        if lease is None:
            return None
        metadata, spec = lease["metadata"], lease.get("spec", {})
        place = (metadata["namespace"], metadata["name"])
        version, since = self._seen.get(place, ("", now))
        if version != metadata["resourceVersion"]:
            version, since = metadata["resourceVersion"], now
        self._seen[place] = (version, since)
        name: str = spec.get("holderIdentity") or ""
        is_over = now - since >= spec.get("leaseDurationSeconds", DURATION_SECONDS)
        return None if not name or is_over or is_dead_here(name) else name


class Lease:
    """The Lease of this operator, and a look at those of others."""

    def __init__(
        self,
        api: ApiServer,
        namespace: str | None,
        clock: Callable[[], float],
        identity: str | None = None,
        *,
        replica_of: str | None = None,
        on_regained: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            replica_of: the installation; the holder is expected to be another replica of it.
            on_regained: called where another operator may have held it for a while.
        """
        self._api = api
        self._on_regained = on_regained
        self._replica_of = replica_of
        self._is_cluster_wide = namespace is None
        self._namespace = CLUSTER_NAMESPACE if namespace is None else namespace
        self.name = CLUSTER_NAME if namespace is None else NAME
        self._clock = clock
        self._identity = identity or own_identity()
        self._sightings = Sightings()
        self._lease: Manifest | None = None
        self._renewed = -float("inf")
        self._believed: dict[str, tuple[str | None, float]] = {}
        self._is_unguarded = False
        self._is_blind = False
        self.holder: str | None = None
        """Who holds the Lease in place of this operator, while it stands by."""
        self.is_reserve = False
        """Whether that is another replica of the same installation."""
        self._asked_seconds = 0.0
        """What the API server asked to wait at the last try."""

    @property
    def is_held(self) -> bool:
        """Whether nobody else can hold it now."""
        return self._is_unguarded or self._clock() - self._renewed < DURATION_SECONDS

    async def acquire(self) -> None:
        """Wait until the Lease is this operator's."""
        while not self.is_held:
            told = self.holder
            await self._take_or_renew()
            if self.holder is not None and self.holder != told:
                logger.warning("standing by: %s", self.describe_holder())
            if not self.is_held:
                await asyncio.sleep(max(RETRY_SECONDS, self._asked_seconds))
        self.holder = None

    def describe_holder(self) -> str:
        """Why this operator does nothing, for people."""
        if self.holder is None:
            return f"the Lease {self._namespace}/{self.name} cannot be taken yet"
        what = "this cluster" if self._is_cluster_wide else f"the namespace {self._namespace}"
        remedy = "this replica stands by" if self.is_reserve else "uninstall one of the two"
        return (
            f"the operator {self.holder} serves {what} "
            f"(Lease {self._namespace}/{self.name}); {remedy}"
        )

    async def renew(self) -> None:
        """Keep the Lease; returns when another operator has it."""
        while True:
            pause = RENEW_SECONDS if self.is_held else RETRY_SECONDS
            await asyncio.sleep(max(pause, self._asked_seconds))
            was_held = self.is_held
            await self._take_or_renew()
            if self.holder is not None:
                return
            if self.is_held and not was_held:
                self._on_regained()

    async def release(self) -> None:
        """Let the next operator begin at once."""
        if self.is_held:
            with contextlib.suppress(ApiError):
                # Read again: a renewal may have been cut off before its answer.
                self._lease = await self._api.get("Lease", self._namespace, self.name)
                if self._is_ours(self._lease):
                    await self._write(None, "renewTime")
            self._renewed = -float("inf")

    async def other_holder(self, namespace: str) -> str | None:
        """The operator of a namespace's own that lives, where this one is cluster-wide."""
        if not self._is_cluster_wide or self._is_unguarded:
            return None
        holder, until = self._believed.get(namespace, (None, 0.0))
        if self._clock() < until:
            return holder
        try:
            lease = await self._api.get("Lease", namespace, NAME)
        except Refused as error:
            # Rights of somebody's own making, to the Lease of this operator alone.
            if not self._is_blind:
                logger.warning("operators of namespaces are not noticed: %s", error)
            self._is_blind = True
            return None
        found = self._sightings.holder(lease, self._clock())
        if found is not None and found != holder:
            logger.warning("the operator %s serves the namespace %s alone", found, namespace)
        seconds = FREE_SECONDS if found is None else BELIEVED_SECONDS
        self._believed[namespace] = (found, self._clock() + seconds)
        return found

    async def _take_or_renew(self) -> None:
        """Renew the Lease, or take it if nobody holds it; `holder` is who else does."""
        self._asked_seconds = 0.0
        try:
            with contextlib.suppress(Conflict, NotFound):
                if self._is_ours(self._lease):
                    await self._write(self._identity, "renewTime")
                    self._is_unguarded = False
                    return
            found = await self._api.get("Lease", self._namespace, self.name)
            holder = self._sightings.holder(found, self._clock())
            self.holder = None if holder == self._identity else holder
            annotations = (found or {}).get("metadata", {}).get("annotations", {})
            is_replica = annotations.get(ANNOTATION_REPLICA_OF) == self._replica_of
            self.is_reserve = self.holder is not None and bool(self._replica_of) and is_replica
            if self.holder is None:
                self._lease = found
                # Another one that was faster is seen at the next try.
                with contextlib.suppress(Conflict):
                    await self._write(self._identity, "acquireTime", "renewTime")
            self._is_unguarded = False
        except Refused as error:
            # Without the right to Leases, to work is better than not to.
            if not self._is_unguarded:
                logger.warning("a second operator would not be noticed: %s", error)
            self._is_unguarded = True
        except ApiError as error:
            logger.warning("the Lease %s cannot be had now: %s", self.name, error)
            self._asked_seconds = error.retry_after_seconds

    def _is_ours(self, lease: Manifest | None) -> bool:
        return bool(lease and lease.get("spec", {}).get("holderIdentity") == self._identity)

    async def _write(self, holder: str | None, *times: str) -> None:
        asked = self._clock()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        found: Manifest = self._lease or {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name, "namespace": self._namespace},
        }
        spec = {**found.get("spec", {}), **dict.fromkeys(times, now)}
        spec |= {"holderIdentity": holder, "leaseDurationSeconds": DURATION_SECONDS}
        metadata: Manifest = found["metadata"]
        if self._replica_of:
            annotations = {
                **metadata.get("annotations", {}),
                ANNOTATION_REPLICA_OF: self._replica_of,
            }
            metadata = {**metadata, "annotations": annotations}
        self._lease = await self._api.write({**found, "metadata": metadata, "spec": spec})
        self._renewed = asked
