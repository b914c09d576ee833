"""The operator as a process against a real API server; its pods stay Pending for want of GPUs."""

from __future__ import annotations

import json
import random
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import stack
import yaml
from audit import AuditLog
from kube import Kubectl, condition, wait_until
from operator_process import OperatorProcess, without_installed_operator
from relay import Relay
from rights import kubeconfig_of_chart
from services import (
    before_a_resync,
    deployment,
    engine_arguments,
    manifest,
    ready_reason,
    start_service,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
CHILDREN = "deployments,services,serviceaccounts"


def test_twenty_services_have_their_deployment_before_a_resync(
    namespace: Kubectl, operator: OperatorProcess, audit_log: AuditLog
) -> None:
    names = [f"chat-{number}" for number in range(20)]
    seconds = seconds_to_deployments(namespace, operator, audit_log, names)
    print(f"apply → Deployment: median {seconds[10]:.3f} s, p99 {seconds[-1]:.3f} s")
    assert seconds[-1] < 20


def seconds_to_deployments(
    namespace: Kubectl, operator: OperatorProcess, audit_log: AuditLog, names: list[str]
) -> list[float]:
    """From the creation of each service to that of its Deployment, in ascending order."""
    before = len(namespace.items("deployments"))
    namespace.apply(yaml.safe_dump_all(manifest(name) for name in names))
    wait_until(
        "all Deployments",
        lambda: len(namespace.items("deployments")) == before + len(names),
        on_timeout=lambda: operator.log,
    )
    made, followed = {}, {}
    for request in audit_log.requests(namespace.namespace):
        if request.status == 201 and request.resource == "llmservices":
            made[request.name] = request.finished
        if request.status == 201 and request.resource == "deployments":
            followed[request.name.removesuffix("-engine")] = request.finished
    return sorted((followed[name] - made[name]).total_seconds() for name in names)


@pytest.mark.parametrize("kind", ["deployment", "service", "serviceaccount"])
def test_a_deleted_child_comes_back_before_a_resync(
    namespace: Kubectl, operator: OperatorProcess, kind: str
) -> None:
    start_service(namespace)
    name = "chat" if kind == "service" else "chat-engine"
    uid = (namespace.get(kind, name) or {})["metadata"]["uid"]
    namespace.run("delete", kind, name, "--wait=false")
    before_a_resync(
        f"{kind} back",
        lambda: (namespace.get(kind, name) or {}).get("metadata", {}).get("uid", uid) != uid,
    )


EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "a changed port": ("service/chat", {"spec": {"ports": [{"port": 81, "targetPort": 1}]}}),
    "a selector that finds nothing": ("service/chat", {"spec": {"selector": {"x": "y"}}}),
    "other replicas": ("deployment/chat-engine", {"spec": {"replicas": 3}}),
    "a node selector of nowhere": (
        "deployment/chat-engine",
        {"spec": {"template": {"spec": {"nodeSelector": {"no": "where"}}}}},
    ),
    "a second container": (
        "deployment/chat-engine",
        {"spec": {"template": {"spec": {"containers": [{"name": "b", "image": "b:1"}]}}}},
    ),
    "no owner": (
        "serviceaccount/chat-engine",
        {"metadata": {"labels": {"pagoda.dev/service": "x"}}},
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_child_is_corrected_before_a_resync(
    namespace: Kubectl, operator: OperatorProcess, edit: str
) -> None:
    start_service(namespace)
    child, patch = EDITS[edit]
    before = wanted_part(namespace, child)
    kind = "strategic" if child.startswith("deployment") else "merge"
    namespace.run("patch", child, f"--type={kind}", "-p", json.dumps(patch))
    before_a_resync(f"{edit} undone", lambda: wanted_part(namespace, child) == before)


def wanted_part(kubectl: Kubectl, child: str) -> dict[str, Any]:
    """What the operator decides of a child."""
    found = kubectl.json("get", child)
    return {"spec": found.get("spec"), "labels": found["metadata"]["labels"]}


def test_delete_leaves_nothing(namespace: Kubectl, operator: OperatorProcess) -> None:
    start_service(namespace)
    namespace.run("delete", "llmservice", "chat")

    def rest() -> list[str]:
        items = namespace.items(f"llmservices,{CHILDREN},replicasets,pods")
        names = [f"{item['kind']}/{item['metadata']['name']}" for item in items]
        others = ("ServiceAccount/default", "ServiceAccount/pagoda-operator")
        return [name for name in names if name not in others]

    wait_until(
        "nothing left",
        lambda: not rest(),
        on_timeout=lambda: f"{rest()}\n{operator.log}",
    )
    time.sleep(1)
    assert not rest()


def test_children_that_have_another_name_than_they_should_go_when_an_operator_starts(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    """As those of an older version may have."""
    start_service(namespace)
    operator.stop()
    for kind in CHILDREN.split(","):
        child = namespace.items(kind, "-l", "pagoda.dev/service=chat")[0]
        kept = {key: child["metadata"][key] for key in ("labels", "ownerReferences")}
        child["metadata"] = {"name": "chat-old", **kept}
        for field in ("clusterIP", "clusterIPs"):
            child.get("spec", {}).pop(field, None)
        namespace.apply(child)
    operator.start()
    wait_until(
        "the old names are gone",
        lambda: (
            not [it for it in namespace.items(CHILDREN) if it["metadata"]["name"] == "chat-old"]
        ),
        on_timeout=lambda: operator.log,
    )
    assert deployment(namespace)


def test_a_service_made_anew_under_its_old_name_works(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    start_service(namespace)
    uid = deployment(namespace)["metadata"]["uid"]
    namespace.run("delete", "llmservice", "chat", "--wait=false")
    namespace.apply(manifest(engine={"maxNumSeqs": 7}))
    wait_until(
        "a Deployment of the new service",
        lambda: deployment(namespace).get("metadata", {}).get("uid", uid) != uid,
        on_timeout=lambda: operator.log,
    )
    assert "--max-num-seqs 7 " in engine_arguments(deployment(namespace))


def test_a_name_that_is_taken_is_said_and_left_alone(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    namespace.run("create", "service", "clusterip", "chat", "--tcp=5:5")
    namespace.apply(manifest())
    wait_until("the conflict", lambda: ready_reason(namespace) == "NameConflict")
    service = namespace.get("llmservice", "chat") or {}
    stalled = condition(service, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "NameConflict")
    assert "Service chat exists" in stalled["message"]
    assert (namespace.get("service", "chat") or {})["spec"]["ports"][0]["port"] == 5
    assert not deployment(namespace)
    namespace.run("delete", "service", "chat")
    wait_until("recovery", lambda: bool(deployment(namespace)))


def test_suspend_and_scale_set_the_replicas(namespace: Kubectl, operator: OperatorProcess) -> None:
    start_service(namespace)
    namespace.run("scale", "llms/chat", "--replicas=3")
    before_a_resync("three", lambda: deployment(namespace)["spec"]["replicas"] == 3)
    namespace.run("patch", "llms/chat", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    wait_until("Suspended", lambda: ready_reason(namespace) == "Suspended")
    assert deployment(namespace)["spec"]["replicas"] == 0
    service = namespace.get("llmservice", "chat") or {}
    assert condition(service, "Ready")["status"] == "True"
    namespace.run("patch", "llms/chat", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    before_a_resync("three again", lambda: deployment(namespace)["spec"]["replicas"] == 3)


def test_an_operator_killed_at_random_moments_converges(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    rng = random.Random(3)
    names = [f"chat-{number}" for number in range(4)]
    for max_num_seqs in range(10, 15):
        services = (manifest(name, engine={"maxNumSeqs": max_num_seqs}) for name in names)
        namespace.apply(yaml.safe_dump_all(services))
        time.sleep(rng.uniform(0.0, 0.3))
        operator.kill()
        operator.start(wait=False)
        time.sleep(rng.uniform(0.5, 2.0))
    operator.kill()
    operator.start()

    def is_converged() -> bool:
        arguments = [engine_arguments(item) for item in namespace.items("deployments")]
        reasons = {ready_reason(namespace, name) for name in names}
        are_right = all("--max-num-seqs 14 " in line for line in arguments)
        return len(arguments) == 4 and are_right and reasons == {"InsufficientGPU"}

    wait_until("converged", is_converged, on_timeout=lambda: operator.log)
    owned = namespace.items(CHILDREN, "-l", "app.kubernetes.io/managed-by=pagoda")
    assert len(owned) == 3 * len(names)
    assert "Traceback" not in operator.log


def test_an_outage_of_the_api_server_is_survived(
    target: stack.Target, namespace: Kubectl, tmp_path: Path
) -> None:
    config = json.loads(Path(kubeconfig_of_chart(namespace, tmp_path)).read_text())
    cluster = config["clusters"][0]["cluster"]
    address = urllib.parse.urlsplit(cluster["server"])
    relay = Relay((str(address.hostname), address.port or 443))
    cluster["server"] = f"https://127.0.0.1:{relay.port}"
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    log = tmp_path / "operator.log"
    process = OperatorProcess(namespace, log, kubeconfig=str(kubeconfig))
    with without_installed_operator(target.kubectl):
        process.start()
        try:
            start_service(namespace)
            relay.cut()
            namespace.apply(manifest(engine={"maxNumSeqs": 7}))
            namespace.run("delete", "service", "chat")
            time.sleep(10)
            assert process.is_running, process.log
            relay.restore()
            wait_until(
                "what was missed is made up for",
                lambda: (
                    namespace.get("service", "chat")
                    and "--max-num-seqs 7 " in engine_arguments(deployment(namespace))
                ),
                on_timeout=lambda: process.log,
            )
            assert process.stop() == 0
        finally:
            process.kill()
            relay.close()


def test_sigterm_ends_the_operator_with_status_zero(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    start_service(namespace)
    assert operator.stop() == 0
    assert "Traceback" not in operator.log


def test_a_claim_without_its_template_is_named(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    claim = {"name": "gpu", "resourceClaimTemplateName": "one-gpu"}
    namespace.apply(manifest(resources={"gpu": {"claims": [claim]}}))
    reason = "ResourceClaimTemplateMissing"
    wait_until(reason, lambda: ready_reason(namespace) == reason)
    pod = deployment(namespace)["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [claim]
    assert pod["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]


def test_a_budget_comes_with_the_second_replica_and_goes_with_it(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    start_service(namespace)
    assert namespace.get("poddisruptionbudget", "chat-engine") is None
    namespace.run("scale", "llms/chat", "--replicas=2")
    found = wait_until(
        "a budget",
        lambda: namespace.get("poddisruptionbudget", "chat-engine"),
    )
    assert found["spec"]["maxUnavailable"] == 1
    assert found["spec"]["selector"] == deployment(namespace)["spec"]["selector"]
    namespace.run("scale", "llms/chat", "--replicas=1")
    before_a_resync(
        "no budget", lambda: namespace.get("poddisruptionbudget", "chat-engine") is None
    )
