"""Carry out a plan, and remember what saves work and bounds fights."""

from __future__ import annotations

import logging

from pagoda_operator.cluster import ApiServer
from pagoda_operator.names import SCALING_MANAGER, ChildRef, Key, Manifest
from pagoda_operator.ownership import take_over
from pagoda_operator.plan import Applied, Apply, Memory, Plan, applied_digest

logger = logging.getLogger(__name__)


async def execute(
    cluster: ApiServer, key: Key, plan: Plan, memory: Memory, now: float
) -> Manifest | None:
    """Write what the plan says. Returns the Deployment as it is then, if it was written.

    Args:
        now: seconds of a monotonic clock.

    Raises:
        ApiError: a write failed; those before it are done.
    """
    deployment = None
    for apply in plan.applies:
        live = await _apply(cluster, key, apply, memory, now)
        if apply.ref.kind == "Deployment":
            deployment = live
    for live in plan.deletes:
        await cluster.delete(live)
        ref = ChildRef.of(live)
        memory.applied.pop(ref, None)
        logger.info("%s: deleted %s", key, ref)
    return deployment


async def _apply(
    cluster: ApiServer, key: Key, apply: Apply, memory: Memory, now: float
) -> Manifest:
    found, is_scaling = apply.live, apply.manager == SCALING_MANAGER
    taken_over = None if found is None or is_scaling else take_over(found)
    if taken_over is not None:
        await cluster.set_managed_fields(apply.manifest, taken_over)
    # A name that was free a moment ago is taken without force: never from a stranger.
    live = await cluster.apply(apply.manifest, manager=apply.manager, force=found is not None)
    if not is_scaling:
        memory.applied[apply.ref] = Applied(applied_digest(apply.manifest), applied_digest(live))
    what, why = f"applied {apply.ref}", ""
    if is_scaling and found is not None:
        before, after = (it["spec"].get("replicas") for it in (found, live))
        what = f"scaled from {before} to {after} replicas"
    # What stays as it was found, as the annotation of `kubectl rollout restart`, is no fight.
    if apply.undoes is not None and (
        is_scaling or found is None or applied_digest(live) != applied_digest(found)
    ):
        memory.contests.note(apply.undoes, now)
        why = f", since {apply.undoes.rival} of it"
    logger.info("%s: %s%s", key, what, why)
    return live
