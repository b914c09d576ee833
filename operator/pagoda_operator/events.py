"""Events: what is told of the transitions of services, and whose pod a warning is about. Pure.

Of each transition there is one event: its name follows from the version of the service that the
transition was seen on, so that a pass that is repeated does not tell of it twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from pagoda_operator.containers import START_WARNINGS
from pagoda_operator.names import API_VERSION, KIND, Key, Manifest, digest, find_condition

CONTROLLER = f"{API_VERSION.partition('/')[0]}/operator"
WARNINGS_OF_PODS = "type=Warning,involvedObject.kind=Pod"
"""Field selector of the events that `service_of` knows."""
_KINDS = ("Ready", "AutoscalingActive")
"""Conditions whose transitions are told; the others say the same as Ready."""
# Nothing has happened yet.
_SILENT_REASONS = ("Progressing", "CheckingModel")
_MAX_NOTE_BYTES = 1024
_POD_NAME = re.compile(r"(.+)-(?:engine-[a-z0-9]+|load-[0-9a-f]{7})-[a-z0-9]{5}")


def render_events(
    manifest: Manifest, status: Manifest, now: datetime, *, instance: str
) -> Iterator[Manifest]:
    """Those of what differs between the service's present status and its next one.

    Args:
        instance: which operator, at most 128 characters.
    """
    before = manifest.get("status", {})
    stalled = find_condition(status, "Stalled").get("status") == "True"
    for kind in _KINDS:
        old, new = (find_condition(it, kind) for it in (before, status))
        is_same = all(old.get(key) == new.get(key) for key in ("status", "reason"))
        if not new or is_same or new["reason"] in _SILENT_REASONS:
            continue
        is_bad = stalled if kind == "Ready" else new["status"] == "False" and not stalled
        yield _render(manifest, new, now, instance, "Warning" if is_bad else "Normal")


def service_of(event: Manifest) -> Key | None:
    """The service whose pod may be meant, if the warning says why a pod does not start."""
    about = event.get("involvedObject", {})
    named = _POD_NAME.fullmatch(str(about.get("name")))
    if named is None or event.get("reason") not in START_WARNINGS:
        return None
    return Key(str(about.get("namespace")), named[1])


def _render(
    manifest: Manifest, condition: Manifest, now: datetime, instance: str, kind: str
) -> Manifest:
    metadata = manifest["metadata"]
    name, namespace, uid = (metadata[key] for key in ("name", "namespace", "uid"))
    seen = [uid, metadata.get("resourceVersion"), condition["type"], condition["reason"]]
    note = condition["message"].encode()[:_MAX_NOTE_BYTES].decode(errors="ignore")
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{digest({'seen': seen})[:16]}", "namespace": namespace},
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": name,
            "namespace": namespace,
            "uid": uid,
        },
        "type": kind,
        "reason": condition["reason"],
        "note": note,
        "action": "Reconcile",
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": CONTROLLER,
        "reportingInstance": instance[:128],
    }
