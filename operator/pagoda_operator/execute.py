"""The writes of one pass: what a plan says, in its order, and pods that nobody else deletes."""

from __future__ import annotations

import contextlib
import logging

from pagoda_operator.causes import failed_pods
from pagoda_operator.cluster import Refused
from pagoda_operator.containers import CRASHES_UNTIL_STALLED
from pagoda_operator.names import MANAGER, ChildRef, Key, Manifest
from pagoda_operator.plan import Applied, Apply, Memory, Plan, is_put_back
from pagoda_operator.recall import Recall

logger = logging.getLogger(__name__)


async def execute(
    recall: Recall, key: Key, plan: Plan, memory: Memory, now: float
) -> Manifest | None:
    """Write what the plan says, and remember what saves saying it again.

    Returns: the Deployment as it is then, if it was written.
    Raises: ApiError: the rest of the plan was not written.
    """
    deployment = None
    for apply in plan.applies:
        live = await _apply(recall, key, apply, memory, now)
        if apply.ref.kind == "Deployment":
            deployment = live
    for live in plan.deletes:
        await recall.cluster.delete(live)
        ref = ChildRef.of(live)
        recall.drop(key, ref)
        memory.applied.pop(ref, None)
        logger.info("%s: deleted %s", key, ref)
    return deployment


async def _apply(recall: Recall, key: Key, apply: Apply, memory: Memory, now: float) -> Manifest:
    found, cluster = apply.live, recall.cluster
    if apply.taken_over is not None:
        await cluster.set_managed_fields(apply.manifest, apply.taken_over)
    # A name that was free a moment ago is taken without force: never from a stranger.
    force = found is not None
    manifest = apply.manifest
    if found is not None:
        # Nothing else that has the name by now.
        uid = found["metadata"]["uid"]
        manifest = {**manifest, "metadata": {**manifest["metadata"], "uid": uid}}
    live = await cluster.apply(manifest, manager=apply.manager, force=force)
    recall.keep(key, live)
    what, why, is_changed = f"applied {apply.ref}", "", True
    if apply.manager == MANAGER:
        last = memory.applied.get(apply.ref)
        memory.applied[apply.ref] = Applied.of(apply.manifest, live)
        is_changed = found is None or is_put_back(last, apply.manifest, found, live)
    elif found is not None:
        before, after = (it["spec"].get("replicas") for it in (found, live))
        what = f"scaled from {before} to {after} replicas"
    # What stays as it was found, as the annotation of `kubectl rollout restart`, is no fight.
    if apply.undoes is not None and is_changed:
        memory.contests.note(apply.undoes, now)
        why = f", since {apply.undoes.rival} of it"
    logger.info("%s: %s%s", key, what, why)
    return live


async def delete_failed(recall: Recall, key: Key, pods: list[Manifest]) -> None:
    """Delete pods that their node ended, except the last few: nobody else does."""
    with contextlib.suppress(Refused):
        for pod in failed_pods(pods)[CRASHES_UNTIL_STALLED:]:
            await recall.cluster.delete(pod)
            recall.drop(key, ref := ChildRef.of(pod))
            logger.info("%s: deleted the pod %s, which its node ended", key, ref.name)
