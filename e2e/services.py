"""LLMServices of the tests that need an API server and no engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kube import Kubectl, condition, wait_until


def manifest(name: str = "chat", **spec: Any) -> dict[str, Any]:
    """An LLMService that no node has a GPU for."""
    return {
        "apiVersion": "pagoda.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name},
        "spec": {"model": {"uri": "hf://org/model"}, **spec},
    }


def deployment(kubectl: Kubectl, name: str = "chat") -> dict[str, Any]:
    return kubectl.get("deployment", f"{name}-engine") or {}


def engine_arguments(deployment: dict[str, Any]) -> str:
    return " ".join(deployment["spec"]["template"]["spec"]["containers"][0]["args"])


def start_service(kubectl: Kubectl, name: str = "chat", **spec: Any) -> None:
    """Apply a service, and wait until its status says that its pods find no GPU."""
    kubectl.apply(manifest(name, **spec))
    wait_until(
        "a status with the cause",
        lambda: ready_reason(kubectl, name) == "InsufficientGPU",
    )


def ready_reason(kubectl: Kubectl, name: str = "chat") -> str:
    service = kubectl.get("llmservice", name) or {}
    current = service.get("metadata", {}).get("generation")
    found = condition(service, "Ready")
    return str(found.get("reason")) if found.get("observedGeneration") == current else "outdated"


def before_a_resync(what: str, check: Callable[[], bool]) -> None:
    """Wait for what a watch brings about: a resync, which would do it too, comes every 60 s."""
    started = time.monotonic()
    wait_until(what, check, timeout_seconds=20, interval_seconds=0.05)
    print(f"{what}: {time.monotonic() - started:.1f} s")
