"""From what is wanted and what was found to the writes that are needed. Pure.

Planning again on the result of a plan gives an empty plan: that is the definition of a steady
state, in which the operator writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pagoda_operator.contest import Edit
from pagoda_operator.names import KIND, ChildRef, Manifest, is_leaving, same_object
from pagoda_operator.ownership import describe_rivals, is_made_by_us, is_scaled_by_us, take_over
from pagoda_operator.spec import LLMService

WAIT_FOR_DELETION_SECONDS = 1.0
# Of the metadata, `digest` takes what matters.
_NOT_OURS = ("metadata", "status", "apiVersion", "kind", "secrets", "imagePullSecrets")


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply said and what it made: the reason not to say it again.

    Both are digests. Losing them (a restart) costs one apply that changes nothing.
    """

    intent: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the API server holds for one LLMService."""

    children: Mapping[ChildRef, Manifest]
    """Objects with the label of the service, and objects that have the name of a child."""
    applied: Mapping[ChildRef, Applied]
    waits: Mapping[Edit, float] = field(default_factory=dict)
    """Seconds before an edit of others may be undone; see `contest`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """A server-side apply; `creates` if nothing of that name was there.

    taken_over: resourceVersion and managedFields to write before; see `ownership.take_over`.
    undoes: the edit, if this puts back what was applied before.
    found: digest of what is there.
    """

    ref: ChildRef
    manifest: Manifest
    creates: bool
    taken_over: Manifest | None = None
    undoes: Edit | None = None
    found: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """A deletion of the object with exactly this uid."""

    ref: ChildRef
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The writes that are needed, in order.

    conflicts: names that others hold. waiting: children that have to be gone first.
    held: edits that others make again and again, and that wait to be undone.
    """

    applies: tuple[Apply, ...] = ()
    deletes: tuple[Delete, ...] = ()
    conflicts: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    held: tuple[Edit, ...] = ()
    requeue_seconds: float | None = None


def make_plan(
    service: LLMService,
    wanted: Mapping[ChildRef, Manifest],
    observed: Observed,
    *,
    target_replicas: int,
) -> Plan:
    """The plan for one LLMService.

    Args:
        wanted: its children, as `render_children` has them.
        target_replicas: with how many replicas a new Deployment begins; see `plan_scale`.
    """
    applies: list[Apply] = []
    held: list[Edit] = []
    conflicts, waiting = [], []
    for ref, manifest in wanted.items():
        live = observed.children.get(ref)
        if live is not None and _is_strangers(live, service):
            conflicts.append(_describe_conflict(ref, live))
        elif live is not None and (is_leaving(live) or not is_ours(live, service)):
            waiting.append(_describe_deletion(ref, live))
        elif (apply := _plan_apply(ref, manifest, observed, target_replicas)) is not None:
            if apply.undoes is not None and apply.undoes in observed.waits:
                held.append(apply.undoes)
            else:
                applies.append(apply)
    deletes = [
        Delete(ref=ref, uid=live["metadata"]["uid"])
        for ref, live in sorted(observed.children.items())
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


def plan_scale(deployment: Manifest, target_replicas: int) -> Manifest | None:
    """The manifest by which the scaling manager sets the replicas; None if they are right."""
    if deployment["spec"].get("replicas", 1) == target_replicas:
        return None
    return same_object(deployment, spec={"replicas": target_replicas})


def digest(manifest: Manifest) -> str:
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
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plan_apply(
    ref: ChildRef, manifest: Manifest, observed: Observed, target_replicas: int
) -> Apply | None:
    """The apply that makes the child what it should be; None if it is."""
    live, applied, intent = observed.children.get(ref), observed.applied.get(ref), digest(manifest)
    found = "" if live is None else digest(live)
    if applied == Applied(intent, found):
        return None
    is_correction = applied is not None and applied.intent == intent
    return Apply(
        ref=ref,
        manifest=_with_replicas(manifest, live, target_replicas),
        creates=live is None,
        taken_over=None if live is None else take_over(live),
        undoes=Edit(ref, describe_rivals(live)) if is_correction else None,
        found=found,
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
