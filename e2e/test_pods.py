"""What a spec adds to real pods (users of the platform's own, Secrets that change, volumes), and
what the status says when a real kubelet ends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import stack
from kube import Kubectl, condition, show_services, wait_ready, wait_until
from llmservices import manifest

NAMESPACE = "e2e-pods"
NAME = "guarded"
# As OpenShift gives them: a number of the namespace's own range, which no image knows.
PLATFORM_USER = 1000680000
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def guarded_service() -> dict[str, Any]:
    spec = {
        "model": {"uri": "pvc://models/gemma-3-270m"},
        "engine": {"maxModelLen": 512, "maxNumSeqs": 4, "extraArgs": ["--num-threads=1"]},
        "resources": {
            "gpu": {"count": 0},
            "cpu": 0.25,
            "cpuLimit": 2,
            "memory": "4Gi",
            "memoryRequest": "2Gi",
            "ephemeralStorage": "4Gi",
        },
        "cache": {"sizeLimit": "256Mi"},
        "auth": {"apiKeysSecretRef": {"name": "keys"}},
        "podTemplate": {
            "labels": {"team": "a"},
            "annotations": {"example.com/note": "kept"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "env": [{"name": "GREETING", "value": "hello"}],
            "volumes": [{"name": "note", "configMap": {"name": "note"}}],
            "volumeMounts": [{"name": "note", "mountPath": "/etc/note", "readOnly": True}],
            "securityContext": {"runAsUser": PLATFORM_USER, "runAsGroup": PLATFORM_USER},
        },
    }
    return manifest(spec, name=NAME)


@pytest.fixture(scope="module")
def kubectl(target: stack.Target, images: dict[str, str]) -> Iterator[Kubectl]:
    """A namespace under Pod Security restricted in which the service is Ready."""
    stack.install_operator(target, images)
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        stack.ensure_model_volume(target, kubectl, images)
        kubectl.run("create", "configmap", "note", "--from-literal=text=read me")
        kubectl.apply(guarded_service())
        # The Secret comes later: the pod waits for it, and says so.
        wait_until(
            "the missing Secret in the status",
            lambda: reason(kubectl) == "SecretMissing",
            timeout_seconds=60,
            on_timeout=lambda: show_services(kubectl),
        )
        kubectl.run("create", "secret", "generic", "keys", "--from-literal=alice=first-key")
        wait_ready(kubectl, NAME)
        yield kubectl


def reason(kubectl: Kubectl, name: str = NAME) -> str:
    path = '{.status.conditions[?(@.type=="Ready")].reason}'
    return kubectl.run("get", "llmservice", name, "-o", f"jsonpath={path}")


def pod(kubectl: Kubectl) -> dict[str, Any]:
    (found,) = kubectl.items("pods", "-l", f"pagoda.dev/service={NAME}")
    return found


def status_with(kubectl: Kubectl, key: str | None) -> int:
    """The HTTP status of a request with this key."""
    service = kubectl.json("get", "service", NAME)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"http://{service['spec']['clusterIP']}/v1/models"
    return httpx.get(url, headers=headers, timeout=10).status_code


def test_the_pod_is_what_its_template_says_under_a_user_that_no_image_knows(
    kubectl: Kubectl,
) -> None:
    found = pod(kubectl)
    assert found["metadata"]["labels"]["team"] == "a"
    assert found["metadata"]["annotations"]["example.com/note"] == "kept"
    script = 'id -u; echo $GREETING; cat /etc/note/text; touch /cache/x && echo " cache"'
    said = kubectl.run("exec", found["metadata"]["name"], "--", "sh", "-c", script)
    assert said.split("\n") == [str(PLATFORM_USER), "hello", "read me cache", ""]
    container = found["spec"]["containers"][0]
    assert container["resources"]["requests"]["cpu"] == "250m"
    assert container["resources"]["limits"]["cpu"] == "2"


def test_a_changed_secret_of_keys_is_in_force_without_a_restart(kubectl: Kubectl) -> None:
    before = pod(kubectl)
    assert status_with(kubectl, None) == 401
    assert status_with(kubectl, "first-key") == 200
    changed = '{"stringData": {"alice": "second-key", "bob": "third-key"}}'
    kubectl.run("patch", "secret", "keys", "-p", changed)
    wait_until("the new key", lambda: status_with(kubectl, "third-key") == 200, timeout_seconds=90)
    assert status_with(kubectl, "second-key") == 200
    assert status_with(kubectl, "first-key") == 401
    after = pod(kubectl)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_pod_that_fills_its_cache_is_evicted_explained_and_replaced(kubectl: Kubectl) -> None:
    before = pod(kubectl)
    fill = "head -c 300M /dev/zero > /cache/full"
    kubectl.run("exec", before["metadata"]["name"], "--", "sh", "-c", fill)
    wait_until(
        "the eviction in the status",
        lambda: reason(kubectl) == "Evicted",
        timeout_seconds=180,
        interval_seconds=0.1,
        on_timeout=lambda: show_services(kubectl),
    )
    said = condition(kubectl.json("get", "llmservice", NAME), "Ready")["message"]
    assert "The node ended the pod (Evicted)" in said
    wait_ready(kubectl, NAME, timeout_seconds=120)


def test_an_engine_killed_for_its_memory_is_told_as_out_of_memory(kubectl: Kubectl) -> None:
    """The child is what the kernel kills; the process that writes the last words lives on."""
    spec = {
        "model": {"uri": "pvc://models/gemma-3-270m"},
        "engine": {"maxModelLen": 512, "maxNumSeqs": 4, "extraArgs": ["--num-threads=1"]},
        "resources": {"gpu": {"count": 0}, "cpu": "250m", "memory": "640Mi"},
    }
    kubectl.apply(manifest(spec, name="small"))
    wait_until(
        "the cause in the status",
        lambda: reason(kubectl, "small") == "OutOfMemory",
        timeout_seconds=120,
        on_timeout=lambda: show_services(kubectl),
    )
    service = kubectl.json("get", "llmservice", "small")
    assert condition(service, "Stalled")["status"] == "True"
    assert "spec.resources.memory" in condition(service, "Ready")["message"]
    (found,) = kubectl.items("pods", "-l", "pagoda.dev/service=small")
    status = found["status"]["containerStatuses"][0]
    ended = status["state"].get("terminated") or status["lastState"]["terminated"]
    assert ended["reason"] == "OOMKilled"
    kubectl.run("delete", "llmservice", "small")
