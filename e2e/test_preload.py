"""A claim is filled by a real Job before engines start; its pod is on a node without a kubelet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_node
import pytest
import stack
from kube import Kubectl, wait_until
from operator_process import OperatorProcess
from services import deployment, engine_arguments, manifest, ready_reason

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
DONE = {
    "phase": "Succeeded",
    "containerStatuses": [
        {
            "name": "preload",
            "image": "engine:1",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": {"exitCode": 0, "reason": "Completed"}},
        }
    ],
}


@pytest.fixture
def node(namespace: Kubectl) -> Iterator[str]:
    """A node for pods of this test alone, and a claim that is bound."""
    name = namespace.namespace
    taint = {"key": "e2e", "value": name, "effect": "NoSchedule"}
    metadata = {"name": name, "labels": {"e2e": name}}
    namespace.apply(
        {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": [taint]}}
    )
    fake_node.offer(namespace, name, {"cpu": "1", "memory": "4Gi"})
    size = {"storage": "1Gi"}
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    claim = {"namespace": namespace.namespace, "name": "hub"}
    volume = {**shared, "capacity": size, "hostPath": {"path": "/nowhere"}, "claimRef": claim}
    namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {**volume, "persistentVolumeReclaimPolicy": "Retain"},
        }
    )
    namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "hub"},
            "spec": {**shared, "volumeName": name, "resources": {"requests": size}},
        }
    )
    yield name
    namespace.run("delete", "node", name)
    namespace.run("delete", "pv", name, "--wait=false")


def spec(node: str, model: str) -> dict[str, Any]:
    return {
        "model": {"uri": model},
        "cache": {"pvc": {"claimName": "hub"}, "preload": True},
        "podTemplate": {"nodeSelector": {"e2e": node}, "tolerations": [{"operator": "Exists"}]},
    }


def finish_job(kubectl: Kubectl, model: str) -> None:
    """Wait for the pod that fetches the model, and say that it has."""

    def loader() -> str | None:
        for pod in kubectl.items("pods", "-l", "app.kubernetes.io/component=preload"):
            is_bound = "nodeName" in pod["spec"] and pod["status"]["phase"] == "Pending"
            if is_bound and model in pod["spec"]["containers"][0]["args"]:
                return str(pod["metadata"]["name"])
        return None

    name = wait_until("a pod that loads", loader)
    patch = json.dumps({"status": DONE})
    kubectl.run("patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)


def test_engines_wait_for_the_job_of_their_model(
    target: stack.Target, namespace: Kubectl, node: str, tmp_path: Path
) -> None:
    with OperatorProcess(namespace, tmp_path / "log").running() as operator:
        namespace.apply(manifest(**spec(node, "hf://org/first")))
        wait_until(
            "Preloading",
            lambda: ready_reason(namespace) == "Preloading",
            on_timeout=lambda: operator.log,
        )
        assert not deployment(namespace)
        finish_job(namespace, "hf://org/first")
        wait_until(
            "engines of the first model",
            lambda: deployment(namespace),
            on_timeout=lambda: operator.log,
        )
        namespace.apply(manifest(**spec(node, "hf://org/second")))
        wait_until("Preloading", lambda: ready_reason(namespace) == "Preloading")
        assert "hf://org/first" in engine_arguments(deployment(namespace))
        finish_job(namespace, "hf://org/second")
        wait_until(
            "engines of the second model",
            lambda: "hf://org/second" in engine_arguments(deployment(namespace)),
            on_timeout=lambda: operator.log,
        )
        assert len(namespace.items("jobs")) == 1
        assert "Traceback" not in operator.log
        assert "forbidden" not in operator.log
