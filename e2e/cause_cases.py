"""The classes of causes: how a pod shows each, and what the status has to say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fake_node import engine
from llmservices import manifest

GPU = "e2e.pagoda.dev/gpu"
SMALL: dict[str, Any] = {"gpu": {"count": 0}, "cpu": "10m", "memory": "512Mi"}


@dataclass(frozen=True)
class Case:
    """A cause: what the spec asks for, how the pod shows it, and what the status has to say."""

    name: str
    reason: str
    part: str
    is_stalled: bool
    spec: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] | None = None
    """Of the pod; None where the scheduler itself says it."""
    event: tuple[str, str] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        return manifest(
            {"model": {"uri": "hf://org/m"}, "resources": SMALL, **self.spec}, self.name
        )


def last_words(reason: str) -> dict[str, Any]:
    words = json.dumps({"reason": reason, "message": f"why {reason}"})
    return ended(1, message=words)


def ended(code: int, restarts: int = 1, **more: Any) -> dict[str, Any]:
    """An engine that runs again after it ended so."""
    terminated = {"exitCode": code, "reason": "Error", **more}
    last = {"terminated": terminated}
    return engine(state={"running": {}}, lastState=last, restartCount=restarts)


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    status = engine(state={"waiting": {"reason": reason, "message": message}})
    return {**status, "phase": "Pending"}


def resources(**more: Any) -> dict[str, Any]:
    return {"resources": {**SMALL, **more}}


NOW = datetime.now(UTC)
STARTED = (NOW - timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
UNREADY = {**engine(started=True, state={"running": {"startedAt": STARTED}})}
# As the controller of nodes leaves it, which knows nothing of the containers.
ON_LOST_NODE = {
    **engine(started=True, ready=True, state={"running": {"startedAt": STARTED}}),
    "conditions": [
        {"type": "Ready", "status": "False"},
        {"type": "ContainersReady", "status": "True"},
        {"type": "PodScheduled", "status": "True"},
    ],
}
EVICTED = {"phase": "Failed", "reason": "Evicted", "message": 'EmptyDir volume "cache" exceeds'}
KILLED = "Container engine failed {} probe, will be restarted"
SCHEDULED = (
    Case("gpu", "InsufficientGPU", GPU, False, {"resources": {"gpu": {"resourceName": GPU}}}),
    Case("cpu", "InsufficientCPU", "spec.resources.cpu", False, resources(cpu=64)),
    Case("memory", "InsufficientMemory", "spec.resources.memory", False, resources(memory="64Gi")),
    Case(
        "disk",
        "InsufficientStorage",
        "spec.resources.ephemeralStorage",
        False,
        resources(ephemeralStorage="64Gi"),
    ),
    Case(
        "label",
        "NoMatchingNode",
        "spec.podTemplate.nodeSelector",
        False,
        {"podTemplate": {"nodeSelector": {"e2e": "pool"}}},
    ),
    Case(
        "volume",
        "VolumeUnavailable",
        "PersistentVolumeClaims",
        False,
        {"model": {"uri": "pvc://unbound/m"}},
    ),
)
PLAYED = (
    Case(
        "image",
        "ImagePullFailed",
        "correct spec.engine.image",
        True,
        status=waiting("ErrImagePull", "no such host"),
    ),
    Case(
        "secret",
        "SecretMissing",
        "create it",
        True,
        status=waiting("CreateContainerConfigError", 'secret "hub" not found'),
    ),
    Case(
        "mount",
        "FailedMount",
        "no route to host",
        False,
        status=waiting("ContainerCreating"),
        event=("FailedMount", 'MountVolume.SetUp failed for volume "m": no route to host'),
    ),
    Case(
        "oom",
        "OutOfMemory",
        "raise spec.resources.memory",
        True,
        status=ended(137, reason="OOMKilled"),
    ),
    *(
        Case(name, reason, f"why {reason}", True, status=last_words(reason))
        for name, reason in (
            ("gpu-oom", "GpuOutOfMemory"),
            ("denied", "ModelAccessDenied"),
            ("not-found", "ModelNotFound"),
            ("disk-full", "DiskFull"),
            ("nccl", "NcclInitFailed"),
        )
    ),
    Case(
        "crash", "CrashLooping", "kubectl logs", True, status=ended(139, 3, message="Segmentation")
    ),
    Case(
        "startup",
        "ProbeFailed",
        "spec.lifecycle.startupTimeoutSeconds",
        False,
        status=ended(137),
        event=("Killing", KILLED.format("startup")),
    ),
    Case(
        "liveness",
        "ProbeFailed",
        "spec.lifecycle.stallSeconds",
        True,
        status=ended(137, 3),
        event=("Killing", KILLED.format("liveness")),
    ),
    Case("readiness", "NotReady", "readiness probe", False, status=UNREADY),
    Case(
        "node-lost",
        "NodeUnreachable",
        "The node causes does not answer",
        False,
        status=ON_LOST_NODE,
    ),
    Case("evicted", "Evicted", "spec.cache.sizeLimit", False, status=EVICTED),
)
CASES = (*SCHEDULED, *PLAYED)
