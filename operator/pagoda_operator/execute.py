"""Carry out a plan, and remember what saves work and bounds fights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from pagoda_operator.cluster import ApiServer
from pagoda_operator.contest import Contests, Edit
from pagoda_operator.names import MANAGER, SCALING_MANAGER, ChildRef, Key, Manifest
from pagoda_operator.ownership import describe_scaler
from pagoda_operator.plan import Applied, Apply, Plan, digest, plan_scale

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Memory:
    """What the passes of one service remember; losing it costs a few writes."""

    applied: dict[ChildRef, Applied] = field(default_factory=dict)
    contests: Contests = field(default_factory=Contests)
    scaled: int | None = None
    """The replicas that the Deployment last had as it should."""
    is_swept: bool = False
    """Whether children that are not wanted any more were looked for and deleted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The Deployment after the writes, and the edits of others that wait to be undone."""

    deployment: Manifest | None
    held: frozenset[Edit] = frozenset()


async def execute(
    cluster: ApiServer,
    key: Key,
    plan: Plan,
    deployment: Manifest | None,
    memory: Memory,
    target: int,
    now: float,
) -> Outcome:
    """Write what the plan says, and then the replicas.

    Args:
        deployment: the live one, if there is one of ours.
        target: the replicas that it should have.
        now: seconds of a monotonic clock.

    Raises:
        ApiError: a write failed; those before it are done.
    """
    if plan.conflicts:
        return Outcome(deployment)
    for apply in plan.applies:
        live = await _apply(cluster, key, apply, memory, now)
        if apply.ref.kind == "Deployment":
            deployment = live
    for delete in plan.deletes:
        await cluster.delete(delete.ref.kind, key.namespace, delete.ref.name, uid=delete.uid)
        memory.applied.pop(delete.ref, None)
        logger.info("%s: deleted %s", key, delete.ref)
    held = frozenset(plan.held)
    if deployment is None or plan.requeue_seconds is not None:
        return Outcome(deployment, held)
    scaled = await _scale(cluster, key, deployment, memory, target, now)
    return Outcome(scaled.deployment, held | scaled.held)


async def _apply(
    cluster: ApiServer, key: Key, apply: Apply, memory: Memory, now: float
) -> Manifest:
    if apply.taken_over is not None:
        await cluster.set_managed_fields(apply.manifest, apply.taken_over)
    # A name that was free a moment ago is taken without force: never from a stranger.
    live = await cluster.apply(apply.manifest, manager=MANAGER, force=not apply.creates)
    result = digest(live)
    memory.applied[apply.ref] = Applied(digest(apply.manifest), result)
    why = ""
    # What stays as it was found, as the annotation of `kubectl rollout restart`, is no fight.
    if apply.undoes is not None and result != apply.found:
        memory.contests.note(apply.undoes, now)
        why = f", since {apply.undoes.rival} of it"
    logger.info("%s: applied %s%s", key, apply.ref, why)
    return live


async def _scale(
    cluster: ApiServer, key: Key, deployment: Manifest, memory: Memory, target: int, now: float
) -> Outcome:
    before = deployment["spec"].get("replicas")
    scale, is_correction = plan_scale(deployment, target), memory.scaled == target
    if scale is None:
        memory.scaled = target
        return Outcome(deployment)
    if is_correction:
        child = ChildRef("Deployment", deployment["metadata"]["name"])
        edit = Edit(child, describe_scaler(deployment))
        if edit in memory.contests.waits(now):
            return Outcome(deployment, frozenset({edit}))
        memory.contests.note(edit, now)
    deployment = await cluster.apply(scale, manager=SCALING_MANAGER, force=True)
    memory.scaled = target
    logger.info("%s: scaled from %s to %d replicas", key, before, target)
    return Outcome(deployment)
