"""Who set which field of a child: reading and rewriting `metadata.managedFields`. Pure.

Server-side apply removes only what its own manager set before. What somebody added by hand (a port,
a container, a node selector) would stay. So before an apply that meets such fields, the operator
lets them count as its own; the apply, which does not send them, then removes them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from pagoda_operator.names import MANAGER, SCALING_MANAGER, Manifest

Fields = dict[str, Any]
"""A tree of fields as in fieldsV1."""

# Annotations are left to whoever sets them: `kubectl rollout restart` works through one.
# Replicas have their own manager; see `plan.plan_scale`.
_LEFT_ALONE = (
    ("f:metadata", "f:annotations"),
    ("f:metadata", "f:finalizers"),
    ("f:spec", "f:template", "f:metadata", "f:annotations"),
    ("f:spec", "f:replicas"),
    ("f:status",),
)


def is_scaled_by_us(deployment: Manifest) -> bool:
    """Whether the scaling manager owns `spec.replicas`."""
    return any(
        entry.get("manager") == SCALING_MANAGER
        and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in _entries(deployment)
    )


def take_over(live: Manifest) -> list[Manifest] | None:
    """The managedFields under which the next apply removes what others added.

    None if nobody else set a field that is ours to decide.
    """
    kept: list[Manifest] = []
    ours: Manifest | None = None
    taken: list[Fields] = []
    for entry in _entries(live):
        if entry.get("manager") == MANAGER and entry.get("operation") == "Apply":
            ours = copy.deepcopy(entry)
            continue
        if entry.get("manager") == SCALING_MANAGER or entry.get("subresource"):
            kept.append(entry)
            continue
        foreign, rest = _split(entry.get("fieldsV1", {}))
        if foreign:
            taken.append(foreign)
        if rest:
            kept.append({**entry, "fieldsV1": rest} if foreign else entry)
    if ours is None or not taken:
        return None
    for foreign in taken:
        _merge(ours["fieldsV1"], foreign)
    return [*kept, ours]


def _entries(manifest: Manifest) -> Iterable[Manifest]:
    entries: list[Manifest] = manifest["metadata"].get("managedFields", [])
    return entries


def _split(fields: Fields) -> tuple[Fields, Fields]:
    """Fields that are ours to decide, and the others."""
    foreign, rest = copy.deepcopy(fields), Fields()
    for path in _LEFT_ALONE:
        _move(foreign, rest, path)
    return foreign, rest


def _move(source: Fields, target: Fields, path: tuple[str, ...]) -> None:
    head, *tail = path
    if head not in source:
        return
    if not tail:
        target[head] = source.pop(head)
        return
    inner = target.get(head, Fields())
    _move(source[head], inner, tuple(tail))
    if inner:
        target[head] = inner
        # What is left is only the mark of the object itself, which is no field to remove.
        if not set(source[head]) - {"."}:
            del source[head]


def _merge(into: Fields, fields: Fields) -> None:
    for name, inner in fields.items():
        _merge(into.setdefault(name, {}), inner)
