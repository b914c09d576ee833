"""What every child of an LLMService has: its name, its labels and its owner. Pure."""

from __future__ import annotations

from typing import Any

from pagoda_operator.names import (
    API_VERSION,
    KIND,
    Manifest,
    api_version,
    common_labels,
    engine_name,
)
from pagoda_operator.spec import LLMService


def render_child(service: LLMService, kind: str, **content: Any) -> Manifest:
    """A child under its name; the Service alone has that of the LLMService."""
    key = service.key
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": key.name,
        "uid": service.uid,
        "controller": True,
        # true would need the right to write finalizers of LLMServices.
        "blockOwnerDeletion": False,
    }
    metadata = {
        "name": key.name if kind == "Service" else engine_name(key.name),
        "namespace": key.namespace,
        "labels": common_labels(key.name),
        "ownerReferences": [owner],
    }
    return {"apiVersion": api_version(kind), "kind": kind, "metadata": metadata, **content}
