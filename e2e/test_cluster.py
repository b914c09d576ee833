"""The local cluster itself: what Pagoda's pods need of it, before Pagoda is on it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import stack
from audit import AuditLog
from kube import Kubectl, wait_until

NAMESPACE = "e2e-cluster"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def kubectl(target: stack.Target) -> Iterator[Kubectl]:
    """A namespace that lets in nothing but Pod Security restricted."""
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        yield kubectl


@pytest.fixture(scope="module")
def server(kubectl: Kubectl, images: dict[str, str]) -> dict[str, Any]:
    """A pod that serves its own name over HTTP, and a Service `front` in front of it."""
    code = "echo served > /tmp/index.html; exec python3 -m http.server 8000 --directory /tmp"
    pod = stack.client_pod("echo", images["operator"], ["sh", "-c", code])
    pod["metadata"]["labels"] = {"app": "echo"}
    pod["spec"]["containers"][0]["readinessProbe"] = {
        "httpGet": {"path": "/", "port": 8000},
        "periodSeconds": 1,
    }
    kubectl.apply(pod)
    ports = [{"port": 80, "targetPort": 8000}]
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "front"},
            "spec": {"selector": {"app": "echo"}, "ports": ports},
        }
    )
    kubectl.run("wait", "--for=condition=Ready", "pod/echo", "--timeout=120s")
    service = kubectl.get("service", "front")
    assert service is not None
    return service


def finished(kubectl: Kubectl, name: str, seconds: float = 300) -> dict[str, Any]:
    """The pod after its end, however it ended."""

    def ended() -> dict[str, Any] | None:
        pod = kubectl.get("pod", name)
        return pod if pod and pod["status"]["phase"] in ("Succeeded", "Failed") else None

    return wait_until(
        f"pod {name} done",
        ended,
        timeout_seconds=seconds,
        on_timeout=lambda: kubectl.run("describe", "pod", name),
    )


def test_a_service_answers_this_machine_at_its_cluster_address(server: dict[str, Any]) -> None:
    address = server["spec"]["clusterIP"]
    answer = wait_until("the Service's answer", lambda: fetch(f"http://{address}/"))
    assert answer == "served\n"


def fetch(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def test_a_pod_reaches_a_service_by_its_name_even_if_it_is_its_own(
    kubectl: Kubectl, server: dict[str, Any]
) -> None:
    code = (
        "import urllib.request as r; print(r.urlopen('http://front/', timeout=5).read().decode())"
    )
    assert kubectl.run("exec", "echo", "--", "python3", "-c", code).strip() == "served"


def test_logs_show_what_a_pod_wrote(kubectl: Kubectl, server: dict[str, Any]) -> None:
    assert "GET /" in kubectl.run("logs", "echo")


def test_a_restricted_pod_imports_torch_and_leaves_its_last_words(
    kubectl: Kubectl, target: stack.Target, images: dict[str, str]
) -> None:
    """Read-only root, the models' claim, shared memory, limits: as an engine's pod is."""
    stack.ensure_model_volume(target, kubectl, images)
    kubectl.apply(torch_pod(images["runtime"]))
    pod = finished(kubectl, "torch")
    state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    words = json.loads(state["message"])
    assert state["exitCode"] == 0
    assert words == {"sum": 6.0, "config": True, "user": 65532, "root_is_read_only": True}


def torch_pod(image: str) -> dict[str, Any]:
    code = """
import json, os, pathlib, torch
import pagoda_runtime
pathlib.Path("/dev/shm/x").write_bytes(b"x")
pathlib.Path("/tmp/x").write_bytes(b"x")
try:
    pathlib.Path("/x").touch()
    read_only = False
except OSError:
    read_only = True
pathlib.Path("/dev/termination-log").write_text(json.dumps({
    "sum": float(torch.ones(2, 3).sum()),
    "config": pathlib.Path("/models/gemma-3-270m/config.json").exists(),
    "user": os.getuid(),
    "root_is_read_only": read_only,
}))
"""
    pod = stack.client_pod("torch", image, ["python", "-c", code])
    container = pod["spec"]["containers"][0]
    container["securityContext"]["readOnlyRootFilesystem"] = True
    # A request that fits beside the demo's engine on two cores; the limit alone would ask for all.
    container["resources"] = {
        "requests": {"cpu": "100m", "memory": "1Gi"},
        "limits": {"cpu": "2", "memory": "2Gi"},
    }
    container["volumeMounts"] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "models", "mountPath": "/models", "readOnly": True},
    ]
    pod["spec"]["volumes"] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    ]
    return pod


def test_a_pod_that_is_not_restricted_is_refused(kubectl: Kubectl, images: dict[str, str]) -> None:
    pod = stack.client_pod("root", images["operator"], ["true"])
    pod["spec"]["securityContext"] = {"runAsUser": 0}
    with pytest.raises(Exception, match="PodSecurity"):
        kubectl.apply(pod)


def test_the_audit_log_names_who_wrote_what(kubectl: Kubectl, audit_log: AuditLog) -> None:
    name = f"audited-{uuid.uuid4().hex[:8]}"
    kubectl.run("create", "configmap", name)

    def requests() -> list[tuple[str, str]]:
        found = audit_log.read(name.encode())
        return [(request.verb, request.user) for request in found if request.name == name]

    written = wait_until("the audit entry", requests)
    assert written == [("create", "kubernetes-admin")]


def test_an_image_that_the_registry_has_is_not_built_again(images: dict[str, str]) -> None:
    command = [sys.executable, str(stack.ROOT / "e2e" / "cluster"), "images"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [images]
