"""The main job against real pods: apply, answer, edit, scale, repair, delete.

One service is shared by the tests of this file, in their order; each leaves it Ready.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import audit
import httpx
import openai
import operator_process
import pytest
import stack
import tool_calls
from kube import Kubectl, condition, wait_ready, wait_until
from llmservices import manifest
from openai.types.chat import ChatCompletionMessage
from services import before_a_resync

NAMESPACE = "e2e-serving"
NAME, MODEL = "gemma", "gemma-3-270m"
Call = Callable[[openai.OpenAI, str], ChatCompletionMessage]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def gemma(**changes: Any) -> dict[str, Any]:
    """A small CPU service; `changes` replace parts of its spec."""
    spec: dict[str, Any] = {
        "model": {"uri": "pvc://models/gemma-3-270m", "name": MODEL},
        "engine": {
            "maxModelLen": 2048,
            "maxNumSeqs": 16,
            # One thread each: two replicas, or an old one and its successor, share two cores.
            "extraArgs": ["--num-threads=1", "--tool-call-parser=hermes"],
        },
        # With two replicas and a successor it fits on two cores beside the demo.
        "resources": {"gpu": {"count": 0}, "cpu": "400m", "memory": "4Gi"},
        "autoscaling": {
            "minReplicas": 1,
            "maxReplicas": 2,
            "targetQueueDepth": 4,
            "scaleDown": {"stabilizationSeconds": 10},
        },
    }
    for key, value in changes.items():
        spec[key] = {**spec[key], **value} if isinstance(value, dict) else value
    return manifest(spec, name=NAME)


@pytest.fixture(scope="module")
def kubectl(target: stack.Target, images: dict[str, str]) -> Iterator[Kubectl]:
    """A namespace with the model's claim, and the operator from the chart beside it."""
    stack.install_operator(target, images)
    # Engine pods must pass the strictest Pod Security level.
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        stack.ensure_model_volume(target, kubectl, images)
        yield kubectl


@pytest.fixture(scope="module")
def serving(kubectl: Kubectl) -> None:
    """An LLMService that is Ready."""
    apply_and_wait(kubectl, gemma())


@pytest.fixture
def url(kubectl: Kubectl, serving: None) -> str:
    """The address of its Service; another one after a test that deleted the Service."""
    service = kubectl.get("service", NAME)
    assert service is not None
    return f"http://{service['spec']['clusterIP']}"


def apply_and_wait(kubectl: Kubectl, service: dict[str, Any], seconds: float = 240) -> None:
    kubectl.apply(service)
    wait_ready(kubectl, NAME, seconds)


def complete(url: str, *, max_tokens: int = 4, timeout: float = 120) -> str:
    """One completion on a connection of its own; raises if it fails in any way."""
    with httpx.Client(timeout=timeout) as client:
        body = {
            "model": MODEL,
            "prompt": "The capital of France is",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        response = client.post(f"{url}/v1/completions", json=body)
        response.raise_for_status()
        return str(response.json()["choices"][0]["text"])


def replicas(kubectl: Kubectl) -> int:
    deployment = kubectl.get("deployment", f"{NAME}-engine")
    return int(deployment["spec"]["replicas"]) if deployment else 0


def test_an_applied_service_answers_the_openai_client(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in text


@pytest.mark.parametrize("call", [tool_calls.call, tool_calls.stream_call])
def test_a_client_gets_a_call_carries_it_out_and_gets_an_answer(url: str, call: Call) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        called = call(client, MODEL)
        assert "42" in tool_calls.answer(client, MODEL, called)


def test_a_pod_starts_with_the_kernels_of_its_image_and_compiles_none(
    kubectl: Kubectl, url: str
) -> None:
    found = engine_pods(kubectl)[0]["metadata"]["name"]
    count = "find /opt/pagoda $PAGODA_CACHE -name '*.kernel' | cut -d / -f 2 | sort | uniq -c"
    kept, folder = kubectl.run("exec", found, "--", "sh", "-c", count).split()
    assert folder == "opt"
    # Of each processor's kernels those without instructions of its own are nine or more.
    assert int(kept) >= 27


def test_the_name_of_the_service_resolves_in_a_pod(
    kubectl: Kubectl, url: str, images: dict[str, str]
) -> None:
    code = (
        "import urllib.request as r;"
        f"print(r.urlopen('http://{NAME}/v1/models').read().decode());"
        f"print(r.urlopen('http://{NAME}.{NAMESPACE}.svc.cluster.local/ready').status)"
    )
    pod = stack.client_pod("dns", images["operator"], ["python3", "-c", code])
    kubectl.apply(pod)
    try:
        wait_until(
            "the client pod done",
            lambda: (kubectl.get("pod", "dns") or {}).get("status", {}).get("phase") == "Succeeded",
            timeout_seconds=60,
            on_timeout=lambda: kubectl.run("logs", "dns"),
        )
        models, status = kubectl.run("logs", "dns").strip().splitlines()
    finally:
        kubectl.run("delete", "pod", "dns", "--wait=false")
    assert json.loads(models)["data"][0]["id"] == MODEL
    assert status == "200"


def test_an_edit_rolls_without_a_failed_request_under_load(kubectl: Kubectl, url: str) -> None:
    before = {pod["metadata"]["name"] for pod in engine_pods(kubectl)}
    stop = threading.Event()

    def keep_asking() -> int:
        done = 0
        while not stop.is_set():
            assert complete(url)
            done += 1
        return done

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(keep_asking) for _ in range(3)]
        try:
            apply_and_wait(kubectl, gemma(engine={"maxModelLen": 1024}))
            wait_until(
                "the old pods gone",
                lambda: not before & {pod["metadata"]["name"] for pod in engine_pods(kubectl)},
                timeout_seconds=120,
            )
        finally:
            stop.set()
        counts = [client.result() for client in clients]
    assert min(counts) >= 3
    models = httpx.get(f"{url}/v1/models").json()
    assert models["data"][0]["max_model_len"] == 1024
    apply_and_wait(kubectl, gemma())


def test_forty_requests_make_two_replicas_and_silence_makes_one(kubectl: Kubectl, url: str) -> None:
    wait_until("one replica", lambda: replicas(kubectl) == 1, timeout_seconds=120)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with client, concurrent.futures.ThreadPoolExecutor(40) as pool:
        # Neither half would do without the other.
        requests = [pool.submit(complete, url, max_tokens=96, timeout=500) for _ in range(20)]
        requests += [pool.submit(tool_calls.call_until, client, MODEL, 96) for _ in range(20)]
        wait_until("two replicas", lambda: replicas(kubectl) == 2, timeout_seconds=60)
        for request in requests:
            assert request.result()
    wait_until("one replica again", lambda: replicas(kubectl) == 1, timeout_seconds=120)
    wait_ready(kubectl, NAME)


@pytest.mark.parametrize("kind", ["service", "serviceaccount"])
def test_a_deleted_child_comes_back_before_a_resync(kubectl: Kubectl, url: str, kind: str) -> None:
    child = kubectl.items(kind, "-l", f"app.kubernetes.io/instance={NAME}")[0]["metadata"]
    kubectl.run("delete", kind, child["name"])

    def is_new() -> bool:
        found = kubectl.get(kind, child["name"])
        return found is not None and found["metadata"]["uid"] != child["uid"]

    before_a_resync(f"{kind} back", is_new)
    wait_ready(kubectl, NAME)


def test_an_edited_child_is_corrected_before_a_resync(kubectl: Kubectl, url: str) -> None:
    patch = '{"spec": {"ports": [{"name": "http", "port": 81, "targetPort": 9}]}}'
    kubectl.run("patch", "service", NAME, "--type=merge", "-p", patch)

    def ports() -> list[int]:
        service = kubectl.get("service", NAME)
        assert service is not None
        return [port["port"] for port in service["spec"]["ports"]]

    before_a_resync("port 80 back", lambda: ports() == [80])


def test_a_killed_operator_converges_after_its_restart(
    target: stack.Target, kubectl: Kubectl, url: str
) -> None:
    operator = target.kubectl.in_namespace(stack.OPERATOR_NAMESPACE)
    operator.run("rollout", "status", "deployment/pagoda-operator", "--timeout=110s")
    pids = wait_until("the operator running", operator_process.pids_in_pods)
    kubectl.apply(gemma(engine={"maxNumSeqs": 9}))
    time.sleep(random.Random(11).uniform(0, 1.5))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    # A new pod starts at once, where the kubelet would hold a killed container back.
    operator.run("delete", "pod", "-l", "app.kubernetes.io/name=pagoda-operator", "--force")
    wait_until(
        "the edit in the Deployment",
        lambda: "--max-num-seqs 9 " in engine_arguments(kubectl),
        timeout_seconds=180,
        on_timeout=lambda: engine_arguments(kubectl),
    )
    apply_and_wait(kubectl, gemma())
    assert complete(url)
    owned = kubectl.items(
        "deployments,services,serviceaccounts", "-l", f"app.kubernetes.io/instance={NAME}"
    )
    assert len(owned) == 3


def test_a_missing_model_is_named_and_a_corrected_spec_recovers(kubectl: Kubectl, url: str) -> None:
    kubectl.apply(gemma(model={"uri": "pvc://models/nothing-here"}))

    def stalled() -> dict[str, Any] | None:
        found = condition(kubectl.get("llmservice", NAME) or {}, "Stalled")
        return found if found.get("status") == "True" else None

    found = wait_until("Stalled", stalled, timeout_seconds=120)
    assert found["reason"] == "ModelNotFound"
    assert "nothing-here" in found["message"]
    assert complete(url), "the old replica serves on while the new one cannot start"
    apply_and_wait(kubectl, gemma())
    assert not stalled()


@pytest.mark.slow
def test_a_steady_state_writes_nothing_from_one_resync_to_the_next(
    target: stack.Target, kubectl: Kubectl, url: str
) -> None:
    wait_ready(kubectl, NAME)
    time.sleep(15)
    log = audit.AuditLog(Path(stack.cluster_paths()["audit_log"]))
    time.sleep(65)
    requests = [request for request in log.requests(NAMESPACE) if request.is_by_operator]
    assert not [request for request in requests if request.is_write]


def test_delete_leaves_nothing(kubectl: Kubectl, url: str) -> None:
    kubectl.run("delete", "llmservice", NAME)
    kinds = "llmservices,deployments,replicasets,services,pods,serviceaccounts"

    def rest() -> list[str]:
        names = [f"{item['kind']}/{item['metadata']['name']}" for item in kubectl.items(kinds)]
        return [name for name in names if name != "ServiceAccount/default"]

    wait_until(
        "everything gone", lambda: not rest(), timeout_seconds=90, on_timeout=lambda: str(rest())
    )


def engine_pods(kubectl: Kubectl) -> list[dict[str, Any]]:
    return kubectl.items("pods", "-l", f"app.kubernetes.io/instance={NAME}")


def engine_arguments(kubectl: Kubectl) -> str:
    deployment = kubectl.get("deployment", f"{NAME}-engine")
    assert deployment is not None
    return " ".join(deployment["spec"]["template"]["spec"]["containers"][0]["args"])
