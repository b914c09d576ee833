"""What the status says where pods or writes fail, against a real API server.

The pods land on a node that has no kubelet: the tests say what a kubelet would.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import stack
from audit import AuditLog
from charts import access, helm
from fake_node import RUNNING, Engines, engine
from kube import Kubectl, KubectlError, wait_until
from llmservices import manifest
from operator_process import OperatorProcess, without_installed_operator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def team(
    target: stack.Target, crds: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kubectl]:
    """A namespace with an operator of its own, which has the rights of the chart alone."""
    log = tmp_path_factory.mktemp("operator") / "operator.log"
    with (
        stack.fresh_namespace(target.kubectl) as kubectl,
        OperatorProcess(kubectl, log).running() as operator,
    ):
        yield kubectl
        assert "Traceback" not in operator.log
        assert "is forbidden: User" not in operator.log


@pytest.fixture(scope="module")
def node(target: stack.Target) -> Iterator[str]:
    """A node without a kubelet, which offers no room but that for engines of these tests."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    target.kubectl.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    target.kubectl.run("delete", "node", name)


def test_a_service_that_no_operator_has_seen_is_in_progress(namespace: Kubectl, node: str) -> None:
    engines = Engines(namespace, node, room=0)
    with without_installed_operator(namespace):
        engines.apply()
        wait_until(
            "the default status",
            lambda: engines.status().get("status") == {"observedGeneration": -1},
            on_timeout=lambda: json.dumps(engines.status()),
        )
        assert engines.kstatus() == "InProgress"


@contextlib.contextmanager
def failing_webhook(engines: Engines, resource: str, name: str, port: int = 9) -> Iterator[None]:
    """Let the API server answer 500 to every write of one object."""
    group, _, plural = resource.rpartition("/")
    # A ConfigMap, which nobody makes, shows whether it is in force.
    targets = ((group, plural.replace(".", "/")), ("", "configmaps"))
    webhook: dict[str, Any] = {
        "name": "broken.e2e.pagoda.dev",
        "clientConfig": {"url": f"https://127.0.0.1:{port}/"},
        "rules": [
            {
                "apiGroups": [api],
                "apiVersions": ["*"],
                "operations": ["CREATE", "UPDATE"],
                "resources": [kind],
            }
            for api, kind in targets
        ],
        "matchConditions": [{"name": "one", "expression": f"request.name == '{name}'"}],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        # Long: it fails at once, and with the same words each time.
        "timeoutSeconds": 10,
        "admissionReviewVersions": ["v1"],
    }
    configuration = f"{engines.name}-{plural}"
    manifest = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": configuration},
        "webhooks": [webhook],
    }
    engines.kubectl.apply(manifest)
    try:
        _wait_until_refused(engines.kubectl, webhook["name"], "create", "configmap", name)
        yield
    finally:
        kind = "validatingwebhookconfiguration"
        engines.kubectl.run("delete", kind, configuration, "--ignore-not-found")


def test_a_status_that_cannot_be_written_is_in_progress(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=0)
    with failing_webhook(engines, "pagoda.dev/llmservices.status", engines.name):
        engines.apply()
        wait_until(
            "the Deployment",
            lambda: engines.kubectl.get("deployment", f"{engines.name}-engine"),
        )
        assert engines.kstatus() == "InProgress"
    engines.wait_for("Ready", "False", "InsufficientGPU")


def test_what_the_api_server_fails_to_write_is_in_the_status(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.serve()
    with failing_webhook(engines, "apps/deployments", f"{engines.name}-engine"):
        engines.apply(engine={"maxNumSeqs": 7})
        engines.wait_for("Reconciling", "True", "ApiServerError", "broken.e2e.pagoda.dev")
        engines.wait_for("Available", "True")
    engines.wait_for("Reconciling", "True", "NoRoomToSurge")


@contextlib.contextmanager
def resetting_port() -> Iterator[tuple[int, list[int]]]:
    """A port that resets every connection, and the ports of the clients: each error names one."""
    clients: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset() -> None:
            # Until the server is closed.
            with contextlib.suppress(OSError):
                while True:
                    connection, (_, client) = server.accept()
                    connection.recv(1)
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.close()
                    clients.append(client)

        thread = threading.Thread(target=reset)
        thread.start()
        yield server.getsockname()[1], clients
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_error_that_is_worded_anew_each_time_is_written_once(
    team: Kubectl, node: str, audit_log: AuditLog
) -> None:
    engines = Engines(team, node, room=1)
    engines.serve()
    child = f"{engines.name}-engine"

    def num_written() -> int:
        requests = audit_log.requests(team.namespace)
        return sum((it.name, it.subresource) == (engines.name, "status") for it in requests)

    with (
        resetting_port() as (port, clients),
        failing_webhook(engines, "apps/deployments", child, port),
    ):
        engines.apply(engine={"maxNumSeqs": 7})
        engines.wait_for("Reconciling", "True", "ApiServerError", "broken.e2e.pagoda.dev")
        before, num_tries = num_written(), len(clients)
        # The first two of them have written what they had to by then. The pauses double.
        wait_until("three tries", lambda: len(clients) >= num_tries + 3, timeout_seconds=180)
    # One is for what the very first error may say otherwise.
    assert num_written() - before <= 1


@contextlib.contextmanager
def policy_against(engines: Engines) -> Iterator[None]:
    """Let an admission policy refuse every write of the Deployment."""
    api, kind = "admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"
    name = engines.name
    rule = {
        "apiGroups": ["apps"],
        "apiVersions": ["v1"],
        "operations": ["UPDATE"],
        "resources": ["deployments"],
        "resourceNames": [f"{name}-engine"],
    }
    validation = {"expression": "false", "message": "frozen by the team", "reason": "Forbidden"}
    policy = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [validation],
    }
    binding = {"policyName": name, "validationActions": ["Deny"]}
    for item, spec in ((kind, policy), (f"{kind}Binding", binding)):
        engines.kubectl.apply(
            {"apiVersion": api, "kind": item, "metadata": {"name": name}, "spec": spec}
        )
    try:
        probe = ("annotate", f"deployment/{name}-engine", "e2e=frozen?")
        _wait_until_refused(engines.kubectl, validation["message"], *probe)
        yield
    finally:
        for item in (f"{kind}Binding", kind):
            engines.kubectl.run("delete", item.lower(), name, "--ignore-not-found")


def _wait_until_refused(kubectl: Kubectl, words: str, *probe: str) -> None:
    """Until a rule for admission is in force: the API server answers the command so."""

    def is_refused() -> bool:
        try:
            kubectl.run(*probe, "--dry-run=server")
        except KubectlError as error:
            return words in str(error)
        return False

    wait_until(f"{words} in force", is_refused)


def test_pods_that_go_while_writes_are_refused_are_not_available(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.serve()
    with policy_against(engines):
        engines.apply(engine={"maxNumSeqs": 7})
        engines.wait_for("Stalled", "True", "Refused", "frozen by the team")
        engines.wait_for("Available", "True")
        engines.play_kubelet(engines.bound_pods()[0], RUNNING, ready=False)
        engines.wait_for("Available", "False", "NoReadyReplica")
        assert engines.status()["status"]["summary"] == "0/1"


def test_pods_behind_a_service_of_another_s_are_not_available(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.serve()
    team.run("create", "configmap", engines.name)
    owner = team.json("get", f"configmap/{engines.name}")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": engines.name, "controller": True}
    reference["uid"] = owner["metadata"]["uid"]
    engines.patch(f"service/{engines.name}", {"metadata": {"ownerReferences": [reference]}})
    engines.wait_for("Stalled", "True", "NameConflict", f"Service {engines.name}")
    engines.wait_for("Available", "False", "NoService")
    team.run("delete", "service", engines.name)
    engines.wait_for("Ready", "True", "Serving")


def test_a_deployment_that_hangs_in_deletion_is_not_in_force(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.serve()
    deployment = f"deployment/{engines.name}-engine"
    engines.patch(deployment, {"metadata": {"finalizers": ["team.dev/keep"]}})
    team.run("delete", deployment, "--wait=false")
    engines.wait_for("Ready", "False", "WaitingForDeletion", "team.dev/keep")
    engines.apply(engine={"maxNumSeqs": 7})
    engines.wait_for("Reconciling", "True", "WaitingForDeletion", "team.dev/keep")
    assert engines.kstatus() == "InProgress"
    engines.patch(deployment, {"metadata": {"finalizers": None}})
    wait_until(
        "a new Deployment",
        lambda: '"7"' in json.dumps(team.get("deployment", f"{engines.name}-engine")),
    )


def test_a_service_scaled_to_three_with_room_for_one_says_so(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.apply(autoscaling={"minReplicas": 3, "maxReplicas": 3})
    wait_until("a pod with a node", engines.bound_pods)
    engines.play_kubelet(engines.bound_pods()[0], RUNNING, ready=True)
    engines.apply(autoscaling={"minReplicas": 1, "maxReplicas": 3})
    engines.wait_for("Ready", "True", "InsufficientGPU", "1 of 3 replicas serve", engines.gpu)
    engines.wait_for("Available", "True", "1 of 3")
    assert engines.kstatus() == "Current"


def test_a_surge_without_room_names_the_pod_that_holds_it(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.serve(rollout={"strategy": "Surge"})
    (old,) = engines.bound_pods()
    engines.apply(engine={"maxNumSeqs": 7}, rollout={"strategy": "Surge"})
    engines.wait_for("Reconciling", "True", "NoRoomToSurge", old, "spec.rollout.strategy")
    engines.apply(engine={"maxNumSeqs": 7}, rollout={"strategy": "InPlace"})

    def new_pods() -> list[str]:
        # No kubelet confirms that the old pod has ended.
        ending = team.get("pod", old) or {"metadata": {}}
        if "deletionTimestamp" in ending["metadata"]:
            team.run("delete", "pod", old, "--force", "--grace-period=0", "--ignore-not-found")
        return [pod for pod in engines.bound_pods() if pod != old]

    (new,) = wait_until("room for the new pod", new_pods)
    engines.play_kubelet(new, RUNNING, ready=True)
    engines.wait_for("Ready", "True", "Serving")


def test_evicted_pods_are_named_and_do_not_pile_up(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.apply()
    message = "The node was low on resource: memory."
    for number in range(5):
        (pod,) = wait_until("a pod with a node", engines.bound_pods)
        engines.play_kubelet(pod, {"phase": "Failed", "reason": "Evicted", "message": message})
        stalled = "True" if number >= 2 else "False"
        engines.wait_for("Ready", "False", "Evicted", message)
        engines.wait_for("Stalled", stalled)

    def failed() -> int:
        label = f"pagoda.dev/service={engines.name}"
        return len(team.items("pods", "-l", label, "--field-selector=status.phase=Failed"))

    wait_until("three of them left", lambda: failed() == 3)


def test_a_pod_that_cannot_mount_its_volume_says_so(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.apply()
    (name,) = wait_until("a pod with a node", engines.bound_pods)
    pod = team.json("get", f"pod/{name}")
    reference = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod["metadata"]["uid"]}
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    team.apply(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.1"},
            "involvedObject": {**reference, "namespace": team.namespace},
            "type": "Warning",
            "reason": "FailedMount",
            "message": 'MountVolume.SetUp failed for volume "models": no route to host',
            "firstTimestamp": now,
            "lastTimestamp": now,
        }
    )
    engines.wait_for("Reconciling", "True", "FailedMount", "no route to host")


def test_what_the_kubelet_says_outranks_last_words_and_a_network_error_is_retried(
    team: Kubectl, node: str
) -> None:
    engines = Engines(team, node, room=1)
    engines.apply()
    (pod,) = wait_until("a pod with a node", engines.bound_pods)
    words = json.dumps({"reason": "RankDied", "message": "was killed by signal 9 (SIGKILL)."})
    exited = {"exitCode": 1, "reason": "OOMKilled", "message": words}
    engines.play_kubelet(pod, engine(lastState={"terminated": exited}, restartCount=1))
    engines.wait_for("Stalled", "True", "OutOfMemory", "spec.resources.memory")
    words = json.dumps({"reason": "SourceUnreachable", "message": "no route to the hub"})
    exited = {"exitCode": 1, "reason": "Error", "message": words}
    engines.play_kubelet(pod, engine(lastState={"terminated": exited}, restartCount=9))
    engines.wait_for("Reconciling", "True", "SourceUnreachable", "no route to the hub")


def test_scaling_that_cannot_see_the_load_of_ready_engines_says_so(
    team: Kubectl, node: str
) -> None:
    """Nobody listens where the pod is said to be."""
    engines = Engines(team, node, room=1)
    engines.serve(autoscaling={"maxReplicas": 3})
    engines.wait_for("AutoscalingActive", "True", "Active")
    (pod,) = engines.bound_pods()
    address = {"podIP": "127.0.0.99", "podIPs": [{"ip": "127.0.0.99"}]}
    engines.play_kubelet(pod, {**RUNNING, **address}, ready=True)
    told = engines.wait_for("AutoscalingActive", "False", "LoadUnknown")
    assert "Scaling is blind: no ready replica tells its load at /load" in told["message"]
    assert "NetworkPolicy" in told["message"]


def test_helm_waits_for_a_service_by_the_rules_of_kstatus(
    target: stack.Target, team: Kubectl, tmp_path: Path
) -> None:
    """Helm has the rules of kstatus built in: the real ones, not this project's copy of them."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: chat, version: 0.1.0}")
    name = f"chat-{uuid.uuid4().hex[:6]}"
    service = manifest({"suspend": "SUSPEND"}, name=name)
    text = json.dumps(service).replace('"SUSPEND"', "{{ .Values.suspend }}")
    (tmp_path / "templates" / "service.yaml").write_text(text)

    def install(*, suspend: bool, seconds: int) -> subprocess.CompletedProcess[str]:
        flags = ("--install", "--wait=watcher", f"--timeout={seconds}s")
        value = f"suspend={str(suspend).lower()}"
        return helm(target, "upgrade", name, str(tmp_path), *flags, "--set", value, *access(team))

    done = install(suspend=True, seconds=120)
    assert done.returncode == 0, done.stderr
    # Its claim is not there, which a person has to change.
    failed = install(suspend=False, seconds=4)
    assert failed.returncode != 0
    assert name in failed.stderr
