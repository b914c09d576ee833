"""From what is wanted and what was found to the writes that are needed. Pure.

Planning again on the result of a plan gives an empty plan: that is the definition of a steady
state, in which the operator writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pagoda_operator.contest import Contests, Edit
from pagoda_operator.names import (
    KIND,
    MANAGER,
    SCALING_MANAGER,
    ChildRef,
    Manifest,
    digest,
    is_leaving,
    same_object,
)
from pagoda_operator.ownership import (
    describe_rivals,
    describe_scaler,
    is_made_by_us,
    is_scaled_by_us,
    take_over,
)
from pagoda_operator.spec import LLMService

WAIT_FOR_DELETION_SECONDS = 1.0
# Of the metadata, `applied_digest` takes what matters.
_NOT_OURS = ("metadata", "status", "apiVersion", "kind", "secrets", "imagePullSecrets")


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply said and what it made: the reason not to say it again.

    All are digests. Losing them (a restart) costs one apply that changes nothing.
    """

    intent: str
    result: str
    purpose: str
    """The intent without the strategy, which follows from how a rollout goes."""

    @classmethod
    def of(cls, manifest: Manifest, live: Manifest) -> Applied:
        return cls(applied_digest(manifest), applied_digest(live), _purpose(manifest))


@dataclass(slots=True)
class Memory:
    """What the passes of one service remember; losing it costs a few writes."""

    applied: dict[ChildRef, Applied] = field(default_factory=dict)
    contests: Contests = field(default_factory=Contests)
    scaled: int | None = None
    """The replicas that the Deployment last had as it should."""
    is_swept: bool = False
    """Whether children that are not wanted any more were looked for and deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """A server-side apply of one of our managers.

    live: what has the name now.
    adopts: whether that has no owner, and gets one.
    taken_over: resourceVersion and managedFields to write before; see `ownership.take_over`.
    undoes: the edit, if this puts back what was applied before.
    """

    ref: ChildRef
    manifest: Manifest
    live: Manifest | None
    adopts: bool = False
    manager: str = MANAGER
    taken_over: Manifest | None = None
    undoes: Edit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The writes that are needed, in order.

    conflicts: names that others hold. waiting: children that have to be gone first.
    held: edits that others make again and again, and that wait to be undone.
    """

    applies: tuple[Apply, ...] = ()
    deletes: tuple[Manifest, ...] = ()
    conflicts: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    held: tuple[Edit, ...] = ()
    requeue_seconds: float | None = None

    def without(self, *kinds: str) -> Plan:
        """The same, but children of these kinds stay as they are, except for replicas."""
        kept = (a for a in self.applies if a.ref.kind not in kinds or a.manager != MANAGER)
        return replace(self, applies=tuple(kept))


def make_plan(
    service: LLMService,
    wanted: Mapping[ChildRef, Manifest],
    children: Mapping[ChildRef, Manifest],
    memory: Memory,
    *,
    target_replicas: int,
    now: float,
) -> Plan:
    """The plan for one LLMService.

    Args:
        wanted: its children, as `render_children` has them.
        children: objects with the label of the service, and those that have the name of a child.
        target_replicas: how many replicas the Deployment should have.
        now: seconds of a monotonic clock.
    """
    applies: list[Apply] = []
    held: list[Edit] = []
    conflicts, waiting = [], []
    waits = memory.contests.waits(now)
    for ref, manifest in wanted.items():
        live = children.get(ref)
        if live is not None and _is_strangers(live, service):
            conflicts.append(_describe_conflict(ref, live))
        elif live is not None and (is_leaving(live) or not is_ours(live, service)):
            waiting.append(_describe_deletion(ref, live))
        else:
            for apply in _plan_applies(ref, manifest, live, memory, target_replicas):
                if apply.undoes is not None and apply.undoes in waits:
                    held.append(apply.undoes)
                else:
                    applies.append(apply)
    deletes = [
        live
        for ref, live in sorted(children.items())
        if ref not in wanted and is_ours(live, service) and not is_leaving(live)
    ]
    if conflicts:
        return Plan(conflicts=tuple(conflicts))
    return Plan(
        applies=tuple(applies),
        deletes=tuple(deletes),
        waiting=tuple(waiting),
        held=tuple(held),
        requeue_seconds=WAIT_FOR_DELETION_SECONDS if waiting else None,
    )


def applied_digest(manifest: Manifest) -> str:
    """A digest of what an apply can set: not status, not what the server counts, not replicas,
    not the Secrets of a ServiceAccount.

    Two live objects have the same digest if nobody edited one into the other.
    """
    metadata = manifest["metadata"]
    content = {key: value for key, value in manifest.items() if key not in _NOT_OURS}
    content["metadata"] = {
        "labels": metadata.get("labels"),
        "ownerReferences": metadata.get("ownerReferences"),
    }
    if "replicas" in content.get("spec", {}):
        content["spec"] = {key: v for key, v in content["spec"].items() if key != "replicas"}
    return digest(content)


def is_put_back(last: Applied | None, manifest: Manifest, found: Manifest, live: Manifest) -> bool:
    """Whether an apply of the manifest changed what it found, another strategy of ours aside.

    Args:
        last: what was applied before. live: what there is after the apply.
    """
    if last is not None and last.intent != applied_digest(manifest):
        return _purpose(found) != _purpose(live)
    return applied_digest(found) != applied_digest(live)


def _purpose(manifest: Manifest) -> str:
    if "strategy" not in manifest.get("spec", {}):
        return applied_digest(manifest)
    spec = {key: value for key, value in manifest["spec"].items() if key != "strategy"}
    return applied_digest({**manifest, "spec": spec})


def _plan_applies(
    ref: ChildRef, manifest: Manifest, live: Manifest | None, memory: Memory, target_replicas: int
) -> Iterator[Apply]:
    """What makes the child as it should be: the rest of it, and the replicas of a Deployment."""
    applied = memory.applied.get(ref)
    if live is None or applied != Applied.of(manifest, live):
        is_correction = (
            applied is not None
            and applied.purpose == _purpose(manifest)
            and (live is None or applied.result != applied_digest(live))
        )
        yield Apply(
            ref=ref,
            manifest=_with_replicas(manifest, live, target_replicas),
            live=live,
            adopts=live is not None and not _controller(live),
            taken_over=None if live is None else take_over(live),
            undoes=Edit(ref, describe_rivals(live)) if is_correction else None,
        )
    if live is None or ref.kind != "Deployment":
        return
    if live["spec"].get("replicas", 1) != target_replicas:
        yield Apply(
            ref=ref,
            manifest=same_object(live, spec={"replicas": target_replicas}),
            live=live,
            manager=SCALING_MANAGER,
            undoes=Edit(ref, describe_scaler(live)) if memory.scaled == target_replicas else None,
        )


def _with_replicas(manifest: Manifest, live: Manifest | None, target_replicas: int) -> Manifest:
    """Add `spec.replicas` to a Deployment as long as the scaling manager does not own it.

    A field that its only owner stops sending goes back to its default, which is one replica.
    """
    if manifest["kind"] != "Deployment" or (live is not None and is_scaled_by_us(live)):
        return manifest
    replicas = target_replicas if live is None else live["spec"].get("replicas", 1)
    return {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}


def _controller(manifest: Manifest) -> Manifest:
    owners: list[Manifest] = manifest["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner.get("controller")), {})


def is_controlled_by(manifest: Manifest, uid: str) -> bool:
    """Whether the object is a child of the LLMService with the uid."""
    return bool(_controller(manifest).get("uid") == uid)


def is_ours(manifest: Manifest, service: LLMService) -> bool:
    """Whether it is a child, or one that lost its owner: left behind, or put back from a backup."""
    if not _controller(manifest):
        return is_made_by_us(manifest, service.key.name)
    return is_controlled_by(manifest, service.uid)


def _is_strangers(manifest: Manifest, service: LLMService) -> bool:
    """Whether it is neither ours nor that of a deleted LLMService of the same name.

    A name belongs to one uid at a time: the garbage collector is on its way to what another uid of
    our name owns.
    """
    owner = _controller(manifest)
    is_namesakes = owner.get("kind") == KIND and owner.get("name") == service.key.name
    return not is_namesakes and not is_ours(manifest, service)


def _describe_conflict(ref: ChildRef, live: Manifest) -> str:
    owner = _controller(live)
    whose = f"{owner.get('kind')} {owner.get('name')}" if owner else "no LLMService"
    return f"{ref} exists and belongs to {whose}; delete it, or give this LLMService another name"


def _describe_deletion(ref: ChildRef, live: Manifest) -> str:
    if not is_leaving(live):
        return f"{ref} belongs to a deleted LLMService of this name, and is deleted with it"
    finalizers = ", ".join(live["metadata"].get("finalizers", [])) or "none"
    return f"{ref} is being deleted (its finalizers: {finalizers}); it is made anew when it is gone"
