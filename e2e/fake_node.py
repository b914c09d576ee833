"""Engines on a node that has no kubelet: a test says of their pods what a kubelet would."""

from __future__ import annotations

import contextlib
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from kube import Kubectl, KubectlError, condition, wait_until

from pagoda_operator.testing import kstatus


class Engines:
    """One LLMService, whose engines find room on the node of the tests alone."""

    def __init__(self, team: Kubectl, node: str, room: int) -> None:
        self.kubectl = team
        self.name = f"chat-{uuid.uuid4().hex[:6]}"
        self.gpu = f"e2e.pagoda.dev/{self.name}"
        offer(team, node, {self.gpu: str(room)})

    def apply(self, **spec: Any) -> None:
        gpu = {"resourceName": self.gpu}
        self.kubectl.apply(
            {
                "apiVersion": "pagoda.dev/v1alpha1",
                "kind": "LLMService",
                "metadata": {"name": self.name},
                "spec": {"model": {"uri": "hf://org/model"}, "resources": {"gpu": gpu}, **spec},
            }
        )

    def serve(self, **spec: Any) -> None:
        """Apply, and let every engine that finds room become ready."""
        self.apply(**spec)
        replicas = spec.get("replicas", 1)
        wait_until("nodes", lambda: len(self.bound_pods()) >= replicas)
        for pod in self.bound_pods():
            self.play_kubelet(pod, RUNNING, ready=True)
        self.wait_for("Ready", "True")

    def bound_pods(self) -> list[str]:
        pods = self.kubectl.items("pods", "-l", f"pagoda.dev/service={self.name}")
        return [
            pod["metadata"]["name"]
            for pod in pods
            if "nodeName" in pod["spec"] and pod["status"]["phase"] in ("Pending", "Running")
        ]

    def play_kubelet(self, pod: str, status: dict[str, Any], *, ready: bool = False) -> None:
        conditions = [
            {"type": "Ready", "status": str(ready)},
            {"type": "PodScheduled", "status": "True"},
        ]
        patch = {"status": {"conditions": conditions, **status}}
        self.patch(f"pod/{pod}", patch, "--subresource=status")

    def patch(self, name: str, patch: dict[str, Any], *flags: str) -> None:
        self.kubectl.run("patch", name, "--type=merge", "-p", json.dumps(patch), *flags)

    def status(self) -> dict[str, Any]:
        return self.kubectl.get("llmservice", self.name) or {}

    def wait_for(self, kind: str, status: str, *parts: str) -> dict[str, Any]:
        """The condition of the present generation, once its reason and message have the parts."""

        def found() -> dict[str, Any] | None:
            service = self.status()
            entry = condition(service, kind)
            text = f"{entry.get('reason')}: {entry.get('message')}"
            is_current = entry.get("observedGeneration") == service["metadata"]["generation"]
            is_it = entry.get("status") == status and all(part in text for part in parts)
            return entry if is_current and is_it else None

        return wait_until(
            f"{kind}={status} {parts}",
            found,
            on_timeout=lambda: json.dumps(self.status().get("status"), indent=1),
        )

    def kstatus(self) -> str:
        return kstatus(self.status())


def offer(kubectl: Kubectl, node: str, resources: dict[str, str]) -> None:
    """Let the node be ready, and have so much of each resource and, unless told, no more."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    times = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "", **times}
    room = {"cpu": "0", "memory": "0", "pods": "64", **resources}
    status = {"capacity": room, "allocatable": room, "conditions": [ready]}
    patch = json.dumps({"status": status})
    kubectl.run("patch", "node", node, "--subresource=status", "--type=merge", "-p", patch)
    # The node's controller takes it away where there is one.
    with contextlib.suppress(KubectlError):
        kubectl.run("taint", "node", node, "node.kubernetes.io/not-ready-")


def engine(**state: Any) -> dict[str, Any]:
    """A pod's status with this state of its container."""
    container = {"name": "engine", "image": "engine:1", "imageID": "", "ready": False}
    statuses = [{**container, "restartCount": 0, "state": {}, **state}]
    return {"phase": "Running", "containerStatuses": statuses}


RUNNING = engine(state={"running": {}})
