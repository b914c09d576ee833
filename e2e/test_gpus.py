"""An LLMService for two GPUs of a product: what it becomes, and to which node its pod goes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stack
import yaml
from fake_node import offer
from kube import Kubectl, condition, show_services, wait_until
from operator_process import OperatorProcess

SERVICE = stack.ROOT / "examples" / "two-gpus.yaml"
GOLDEN = stack.ROOT / "tests" / "operator" / "golden/two-gpus.yaml"
NAME = "llama-70b"
PRODUCT = "nvidia.com/gpu.product"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def children() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(GOLDEN.read_text()))


@pytest.fixture
def node(target: stack.Target) -> Iterator[str]:
    """A node without a kubelet, with two GPUs and the taint that keeps other pods off them."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    target.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {PRODUCT: "NVIDIA-L4"}},
            "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
        }
    )
    offer(target.kubectl, name, {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "2"})
    yield name
    target.kubectl.run("delete", "node", name)


@pytest.fixture
def service(namespace: Kubectl, tmp_path: Path, node: str) -> Iterator[Kubectl]:
    """The namespace in which an operator serves the golden LLMService."""
    image = children()[-1]["spec"]["template"]["spec"]["containers"][0]["image"]
    operator = OperatorProcess(namespace, tmp_path / "operator.log", engine_image=image)
    with operator.running():
        namespace.apply(SERVICE.read_text())
        yield namespace


def wait_for_reason(kubectl: Kubectl, reason: str) -> str:
    """The message of the condition Ready once its reason is this one."""

    def found() -> str | None:
        entry = condition(kubectl.get("llmservice", NAME) or {}, "Ready")
        return str(entry["message"]) if entry.get("reason") == reason else None

    return wait_until(reason, found, on_timeout=lambda: show_services(kubectl))


def differences(golden: Any, live: Any, path: str) -> list[str]:
    """Where the live object has not what the golden one has; it may have defaults beside it."""
    if isinstance(golden, dict) and isinstance(live, dict):
        pairs = [(f"{path}.{key}", golden[key], live.get(key)) for key in golden]
    elif isinstance(golden, list) and isinstance(live, list) and len(golden) == len(live):
        both = zip(golden, live, strict=True)
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(both)]
    else:
        return [] if golden == live else [f"{path}: {golden!r} is not {live!r}"]
    return [found for name, a, b in pairs for found in differences(a, b, name)]


def test_a_service_for_two_gpus_is_what_its_golden_file_says_and_finds_its_node(
    service: Kubectl, node: str
) -> None:
    message = wait_for_reason(service, "InsufficientGPU")
    assert "2 free nvidia.com/gpu of the product NVIDIA-H200 or NVIDIA-B200" in message
    owner = service.json("get", f"llmservice/{NAME}")["metadata"]["uid"]
    for golden in children():
        metadata = golden["metadata"]
        metadata["namespace"] = service.namespace
        metadata["ownerReferences"][0]["uid"] = owner
        live = service.json("get", golden["kind"].lower(), metadata["name"])
        assert not differences(golden, live, golden["kind"])
    service.run("label", "node", node, f"{PRODUCT}=NVIDIA-H200", "--overwrite")

    def nodes() -> list[str]:
        pods = service.items("pods", "-l", f"pagoda.dev/service={NAME}")
        return [pod["spec"]["nodeName"] for pod in pods if "nodeName" in pod["spec"]]

    assert wait_until("a pod with a node", nodes) == [node]
    wait_for_reason(service, "Progressing")
