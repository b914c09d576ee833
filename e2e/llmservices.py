"""LLMServices that tests send to a real API server."""

from __future__ import annotations

from typing import Any


def manifest(spec: dict[str, Any], name: str = "x") -> dict[str, Any]:
    merged = {"model": {"uri": "pvc://models/a"}, **spec}
    return {
        "apiVersion": "pagoda.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name},
        "spec": {key: value for key, value in merged.items() if value is not None},
    }
