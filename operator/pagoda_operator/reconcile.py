"""Make the cluster be what one LLMService asks for.

`Reconciler.reconcile(key)` reads the object and everything that belongs to it live, plans, writes
what the plan says and then the status, if it differs. It never depends on what changed, on having
seen an event, or on how an earlier pass ended: a pass may be cut off after any write, and the next
one goes on from what it finds. All it remembers is what saves work (`plan.Applied`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pagoda_operator.autoscaling import autoscaling_condition
from pagoda_operator.causes import Cause, find_cause
from pagoda_operator.cluster import Cluster, NotFound, Refused, status_manifest
from pagoda_operator.names import (
    CHILD_KINDS,
    LABEL_SERVICE,
    MANAGER,
    SCALING_MANAGER,
    ChildRef,
    Key,
    Manifest,
    engine_name,
)
from pagoda_operator.ownership import replicas_owner
from pagoda_operator.plan import Applied, Observed, Plan, digest, make_plan, plan_scale
from pagoda_operator.poll import Poller
from pagoda_operator.render import render_children, revision_of
from pagoda_operator.spec import LLMService, SpecError, parse
from pagoda_operator.status import failed_status, make_status

logger = logging.getLogger(__name__)

REFUSED_RETRY_SECONDS = 30.0
# The first status waits until the pods exist, and until other new services have their children.
FIRST_STATUS_SECONDS = 0.3
# What holds the name has no label of ours: nobody tells when it goes.
CONFLICT_RETRY_SECONDS = 10.0


def utc_now() -> datetime:
    return datetime.now(UTC)


async def _nothing() -> list[Manifest]:
    return []


@dataclass(frozen=True, slots=True)
class _World:
    """What one pass read."""

    children: dict[ChildRef, Manifest]
    pods: list[Manifest]


class Reconciler:
    """Reconciles any LLMService; at most one pass per key at a time."""

    def __init__(
        self,
        cluster: Cluster,
        poller: Poller,
        *,
        engine_image: str,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._cluster = cluster
        self._poller = poller
        self._engine_image = engine_image
        self._now = now
        self._applied: dict[Key, dict[ChildRef, Applied]] = {}

    async def reconcile(self, key: Key) -> float | None:
        """One pass. Returns after how many seconds to come again, None if only upon a change.

        Raises:
            ApiError: the API server refused or did not answer; come again later.
        """
        manifest = await self._cluster.get("LLMService", key.namespace, key.name)
        if manifest is None or "deletionTimestamp" in manifest["metadata"]:
            # The garbage collector deletes the children: they name their owner.
            self.forget(key)
            return None
        try:
            service = parse(manifest)
        except SpecError as error:
            self._poller.forget(key)
            await self._write_failure(manifest, "InvalidSpec", str(error))
            return None
        world = await self._observe(service, manifest.get("status", {}))
        deployment = world.children.get(ChildRef("Deployment", engine_name(key.name)))
        target = self._poller.target(service, manifest.get("status", {}), deployment)
        applied = self._applied.setdefault(key, {})
        observed = Observed(children=world.children, applied=applied)
        plan = make_plan(service, observed, target_replicas=target, engine_image=self._engine_image)
        if plan.conflicts:
            self._poller.forget(key)
            await self._write_failure(manifest, "NameConflict", "; ".join(plan.conflicts))
            return CONFLICT_RETRY_SECONDS
        try:
            deployment = await self._execute(key, plan, deployment, target)
        except Refused as error:
            reason = "QuotaExceeded" if "exceeded quota" in error.message else "Refused"
            await self._write_failure(manifest, reason, error.message)
            return REFUSED_RETRY_SECONDS
        if plan.applies and "observedGeneration" not in manifest.get("status", {}):
            return FIRST_STATUS_SECONDS
        cause = self._find_cause(service, deployment, world.pods, plan)
        status = make_status(
            service,
            deployment=deployment,
            cause=cause,
            desired_replicas=target,
            previous=manifest.get("status", {}),
            now=self._now(),
            further=autoscaling_condition(
                service.spec,
                replicas_owner=replicas_owner(manifest),
                blindness=self._poller.blindness(key),
            ),
        )
        await self._write_status(manifest, status)
        self._poller.watch(service, target, world.pods)
        return plan.requeue_seconds

    def forget(self, key: Key) -> None:
        """The LLMService is gone."""
        self._applied.pop(key, None)
        self._poller.forget(key)

    async def _observe(self, service: LLMService, status: Manifest) -> _World:
        """The children, by name and where needed by label, and the pods.

        An object of ours whose name the renderer does not give (any more) was made by an earlier
        operator: to look for them once is enough, and never for a service that is new.
        """
        namespace, selector = service.key.namespace, f"{LABEL_SERVICE}={service.key.name}"
        wanted = list(render_children(service, engine_image=self._engine_image))
        is_known = service.key in self._applied
        is_new = not is_known and "observedGeneration" not in status
        kinds = () if is_new or is_known else CHILD_KINDS
        *lists, pods = await asyncio.gather(
            *(self._cluster.list(kind, namespace, selector) for kind in kinds),
            _nothing() if is_new else self._cluster.list("Pod", namespace, selector),
        )
        children = {
            ChildRef(kind, item["metadata"]["name"]): item
            for kind, items in zip(kinds, lists, strict=True)
            for item in items
        }
        unseen = [ref for ref in wanted if ref not in children]
        found = await asyncio.gather(
            *(self._cluster.get(ref.kind, namespace, ref.name) for ref in unseen)
        )
        children |= {ref: item for ref, item in zip(unseen, found, strict=True) if item is not None}
        return _World(children, pods)

    async def _execute(
        self, key: Key, plan: Plan, deployment: Manifest | None, target: int
    ) -> Manifest | None:
        """Write what the plan says; returns the Deployment as it is afterwards."""
        applied = self._applied[key]
        for apply in plan.applies:
            if apply.taken_over is not None:
                await self._cluster.set_managed_fields(apply.manifest, apply.taken_over)
            # A name that was free a moment ago is taken without force: never from a stranger.
            live = await self._cluster.apply(
                apply.manifest, manager=MANAGER, force=not apply.creates
            )
            applied[apply.ref] = Applied(digest(apply.manifest), digest(live))
            logger.info("%s: applied %s", key, apply.ref)
            if apply.ref.kind == "Deployment":
                deployment = live
        for delete in plan.deletes:
            await self._cluster.delete(
                delete.ref.kind, key.namespace, delete.ref.name, uid=delete.uid
            )
            applied.pop(delete.ref, None)
            logger.info("%s: deleted %s", key, delete.ref)
        if deployment is None or plan.requeue_seconds is not None:
            return deployment
        if (scale := plan_scale(deployment, target)) is not None:
            before = deployment["spec"].get("replicas")
            deployment = await self._cluster.apply(scale, manager=SCALING_MANAGER, force=True)
            logger.info("%s: scaled from %s to %d replicas", key, before, target)
        return deployment

    def _find_cause(
        self, service: LLMService, deployment: Manifest | None, pods: list[Manifest], plan: Plan
    ) -> Cause | None:
        if plan.requeue_seconds is not None:
            text = "Objects of a deleted LLMService of this name are still being deleted."
            return Cause("WaitingForDeletion", text, False)
        if deployment is None:
            return None
        return find_cause(service.spec, deployment, pods, revision_of(deployment))

    async def _write_failure(self, manifest: Manifest, reason: str, message: str) -> None:
        status = failed_status(
            manifest["metadata"]["generation"],
            reason,
            message[:1024],
            previous=manifest.get("status", {}),
            now=self._now(),
        )
        await self._write_status(manifest, status)

    async def _write_status(self, manifest: Manifest, status: Manifest) -> None:
        previous: dict[str, Any] = manifest.get("status", {})
        if status == previous:
            return
        try:
            await self._cluster.apply_status(status_manifest(manifest, status), manager=MANAGER)
        except NotFound:
            logger.info("%s is gone", manifest["metadata"]["name"])
