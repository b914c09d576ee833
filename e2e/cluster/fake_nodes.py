"""Nodes without machines on a control plane: kwok says of their pods what kubelets would.

A pod is ready as soon as it has a node. Its address is one of loopback,
where a program of this machine can answer for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .binaries import ensure_binaries
from .processes import Program, start, stop
from .settings import Settings

LABEL = "pagoda.dev/fake-node"
POD_CIDR = "127.64.0.1/16"
# Shorter than what a controller manager waits for, which is 50 s by default.
LEASE_SECONDS = 40


@contextmanager
def fake_nodes(settings: Settings) -> Iterator[None]:
    """Let nodes with the label of `node` be ready and play their pods, for a while."""
    ensure_binaries(settings, "kwok")
    stages = settings.config / "kwok.yaml"
    stages.write_text("\n---\n".join(json.dumps(stage) for stage in _stages()))
    program = settings.bin / "kwok"
    flags = {
        "kubeconfig": settings.kubeconfig,
        "config": stages,
        "manage-nodes-with-label-selector": LABEL,
        "cidr": POD_CIDR,
        "node-ip": "127.0.0.1",
        # Nobody asks its nodes for logs.
        "node-port": 0,
        "node-lease-duration-seconds": LEASE_SECONDS,
    }
    command = [str(program), *(f"--{name}={value}" for name, value in flags.items())]
    start(settings, Program("kwok", command))
    try:
        yield
    finally:
        stop(settings, "kwok")


def node(name: str, *, num_gpus: int, num_pods: int) -> dict[str, Any]:
    """A node that has so many GPUs and room for so many pods."""
    room = {"cpu": "1k", "memory": "1Ti", "pods": str(num_pods), "nvidia.com/gpu": str(num_gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {LABEL: "true", "kubernetes.io/hostname": name}},
        "status": {"capacity": room, "allocatable": room},
    }


def _stages() -> Iterator[dict[str, Any]]:
    yield _stage("node-ready", "Node", [_condition("Ready", "NotIn", "True")], _NODE_STATUS)
    lives = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
    pending = {"key": ".status.phase", "operator": "In", "values": ["Pending"]}
    yield _stage("pod-ready", "Pod", [lives, pending], _POD_STATUS)
    leaving = {"key": ".metadata.deletionTimestamp", "operator": "Exists"}
    gone = _stage("pod-gone", "Pod", [leaving], "")
    gone["spec"]["next"] = {"delete": True}
    yield gone


def _stage(name: str, kind: str, expressions: list[Any], template: str) -> dict[str, Any]:
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": expressions},
            "next": {"statusTemplate": template},
        },
    }


def _condition(kind: str, operator: str, value: str) -> dict[str, Any]:
    key = f'.status.conditions.[] | select( .type == "{kind}" ) | .status'
    return {"key": key, "operator": operator, "values": [value]}


_NODE_STATUS = """
{{ $now := Now }}
conditions:
{{ range NodeConditions }}
- lastHeartbeatTime: {{ $now | Quote }}
  lastTransitionTime: {{ $now | Quote }}
  message: {{ .message | Quote }}
  reason: {{ .reason | Quote }}
  status: {{ .status | Quote }}
  type: {{ .type | Quote }}
{{ end }}
addresses:
- address: {{ NodeIP | Quote }}
  type: InternalIP
"""
_POD_STATUS = """
{{ $now := Now }}
conditions:
- {lastTransitionTime: {{ $now | Quote }}, status: "True", type: Initialized}
- {lastTransitionTime: {{ $now | Quote }}, status: "True", type: Ready}
- {lastTransitionTime: {{ $now | Quote }}, status: "True", type: ContainersReady}
containerStatuses:
{{ range .spec.containers }}
- image: {{ .image | Quote }}
  imageID: ""
  name: {{ .name | Quote }}
  ready: true
  started: true
  restartCount: 0
  state:
    running:
      startedAt: {{ $now | Quote }}
{{ end }}
hostIP: {{ NodeIP | Quote }}
{{ with .metadata }}
{{ $ips := PodIPsWith $.spec.nodeName false .uid .name .namespace }}
podIP: {{ index $ips 0 | Quote }}
podIPs:
- ip: {{ index $ips 0 | Quote }}
{{ end }}
phase: Running
startTime: {{ $now | Quote }}
"""
