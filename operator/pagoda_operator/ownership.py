"""Who set which field of a child: reading and rewriting `metadata.managedFields`. Pure.

Server-side apply removes only what its own manager set before. What somebody added by hand (a port,
a container, a node selector) would stay. So before an apply that meets such fields, the operator
lets them count as its own; the apply, which does not send them, then removes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pagoda_operator.names import (
    LABEL_MANAGED_BY,
    LABEL_SERVICE,
    MANAGED_BY,
    MANAGER,
    SCALING_MANAGER,
    Manifest,
)

Fields = dict[str, Any]
"""A tree of fields as in fieldsV1."""
Path = tuple[str, ...]
"""A leaf of such a tree; one that ends in "." is the mark of the object around it."""

LABEL_RESTORED = "velero.io/restore-name"
MAX_PATHS_SHOWN = 3
# Annotations are left to whoever sets them: `kubectl rollout restart` works through one. So are
# labels of a child that are not ours, by which backups, policies and bills find their objects.
# Replicas have their own manager; see `plan.plan_scale`.
_LEFT_ALONE = (
    ("f:metadata", "f:annotations"),
    ("f:metadata", "f:labels"),
    ("f:metadata", "f:finalizers"),
    ("f:spec", "f:template", "f:metadata", "f:annotations"),
    ("f:spec", "f:replicas"),
    ("f:status",),
    # Of a ServiceAccount: registries' and tokens' Secrets, which people and platforms add.
    ("f:secrets",),
    ("f:imagePullSecrets",),
)


def is_made_by_us(live: Manifest, service_name: str) -> bool:
    """Whether an object says that Pagoda made it for the service: by its labels and its fields.

    A backup may lose who set the fields, and says that it put the object back.
    """
    labels = live["metadata"].get("labels", {})
    is_labelled = labels.get(LABEL_MANAGED_BY) == MANAGED_BY and (
        labels.get(LABEL_SERVICE) == service_name
    )
    is_restored = LABEL_RESTORED in live["metadata"].get("labels", {})
    return is_labelled and (is_restored or any(_is_our_apply(entry) for entry in _entries(live)))


def is_scaled_by_us(deployment: Manifest) -> bool:
    """Whether the scaling manager owns `spec.replicas`."""
    return any(
        entry.get("manager") == SCALING_MANAGER and _sets_replicas(entry)
        for entry in _entries(deployment)
    )


def replicas_owner(service: Manifest) -> str | None:
    """Who set `spec.replicas` of an LLMService; None if it is no more than the CRD's default.

    The API server says of clients that create or replace a whole object that they set its defaults
    too: of those, only another number counts.
    """
    is_default = service["spec"].get("replicas", 1) == 1
    for entry in _entries(service):
        is_meant = entry.get("operation") == "Apply" or entry.get("subresource") == "scale"
        if _sets_replicas(entry) and (is_meant or not is_default):
            return str(entry["manager"])
    return None


def take_over(live: Manifest) -> Manifest | None:
    """The metadata under which the next apply removes what others added: new managedFields, and
    the resourceVersion that they are for.

    None if nobody else set a field that is ours to decide.
    """
    kept: list[Manifest] = []
    ours: Manifest | None = None
    taken: set[Path] = set()
    for entry in _entries(live):
        if _is_our_apply(entry):
            ours = entry
        elif foreign := _foreign(entry):
            taken |= foreign
            if rest := set(_leaves(entry["fieldsV1"])) - foreign:
                kept.append({**entry, "fieldsV1": _tree(rest)})
        else:
            kept.append(entry)
    if not taken:
        return None
    ours = ours or _first_entry(live)
    ours = {**ours, "fieldsV1": _tree(taken.union(_leaves(ours["fieldsV1"])))}
    version = live["metadata"]["resourceVersion"]
    return {"resourceVersion": version, "managedFields": [*kept, ours]}


def _first_entry(live: Manifest) -> Manifest:
    """Of an object that we adopt, and never applied."""
    entry = {"manager": MANAGER, "operation": "Apply", "apiVersion": live["apiVersion"]}
    return {**entry, "fieldsType": "FieldsV1", "fieldsV1": {}}


def describe_rivals(live: Manifest | None) -> str:
    """Who changes which field of a child, as words that `of CHILD` can follow."""
    if live is None:
        return "somebody deletes the whole"
    told = []
    for entry in _entries(live):
        if foreign := _foreign(entry):
            fields = [path for path in foreign if path[-1] != "."]
            paths = sorted({_describe(path) for path in fields or foreign})
            shown = ", ".join(paths[:MAX_PATHS_SHOWN])
            more = f" and {len(paths) - MAX_PATHS_SHOWN} more" * (len(paths) > MAX_PATHS_SHOWN)
            told.append(f"{entry.get('manager')} sets {shown}{more}")
    return " and ".join(told) or "somebody removes fields"


def describe_scaler(deployment: Manifest) -> str:
    """Who sets the replicas of a Deployment that the operator scales."""
    managers = [
        str(entry["manager"])
        for entry in _entries(deployment)
        if _sets_replicas(entry) and entry["manager"] not in (MANAGER, SCALING_MANAGER)
    ]
    return f"{' and '.join(managers) or 'somebody'} sets spec.replicas"


def _describe(path: Path) -> str:
    """A path as a person writes it."""
    text = ""
    for name in path:
        kind, _, value = name.partition(":")
        if kind == "f":
            text += f".{value}"
        elif kind == "k":
            text += f"[{','.join(str(part) for part in json.loads(value).values())}]"
    return text.removeprefix(".")


def _is_our_apply(entry: Manifest) -> bool:
    return entry.get("manager") == MANAGER and entry.get("operation") == "Apply"


def _sets_replicas(entry: Manifest) -> bool:
    return "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})


def _entries(manifest: Manifest) -> Iterable[Manifest]:
    entries: list[Manifest] = manifest["metadata"].get("managedFields", [])
    return entries


def _foreign(entry: Manifest) -> set[Path]:
    """What another manager than ours set of the fields that are ours to decide."""
    is_ours = _is_our_apply(entry) or entry.get("manager") == SCALING_MANAGER
    if is_ours or entry.get("subresource"):
        return set()
    return {path for path in _leaves(entry.get("fieldsV1", {})) if not _is_left_alone(path)}


def _is_left_alone(path: Path) -> bool:
    # The mark of an object that has such fields is no field to remove.
    is_mark, parent = path[-1] == ".", path[:-1]
    return any(
        path[: len(left)] == left or (is_mark and left[: len(parent)] == parent)
        for left in _LEFT_ALONE
    )


def _leaves(fields: Fields, path: Path = ()) -> Iterator[Path]:
    for name, inner in fields.items():
        yield from _leaves(inner, (*path, name)) if inner else [(*path, name)]


def _tree(leaves: Iterable[Path]) -> Fields:
    tree = Fields()
    for path in leaves:
        node = tree
        for name in path:
            node = node.setdefault(name, {})
    return tree
