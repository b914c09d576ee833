"""The operator beside others: platforms, people, backups, scalers, a second operator."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import stack
from audit import AuditLog
from kube import Kubectl, condition, wait_until
from operator_process import (
    ENGINE_IMAGE,
    OperatorProcess,
    installed_engine_image,
)
from services import before_a_resync, deployment, manifest, ready_reason, start_service

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("team_operator"),
]


def patch(kubectl: Kubectl, child: str, change: dict[str, Any], *flags: str) -> None:
    kubectl.run("patch", child, "--type=merge", "-p", json.dumps(change), *flags)


def writes(audit_log: AuditLog, kubectl: Kubectl, words: str) -> list[str]:
    """What the operator wrote, where the line has the words: others of the tests are served too."""
    lines = [
        f"{request.verb} {request.resource}/{request.subresource} {request.name} {request.status}"
        for request in audit_log.requests(kubectl.namespace)
        if request.is_by_operator and request.is_write
    ]
    return [line for line in lines if words in line]


def test_secrets_that_a_platform_adds_to_a_service_account_stay_and_cost_no_write(
    team: Kubectl, audit_log: AuditLog
) -> None:
    start_service(team, "account")
    about = "serviceaccounts/ account-engine"
    before = len(writes(audit_log, team, about))
    added = {"imagePullSecrets": [{"name": "registry"}], "secrets": [{"name": "token"}]}
    patch(team, "sa/account-engine", added)
    time.sleep(2)
    account = team.json("get", "sa/account-engine")
    assert {key: account.get(key) for key in added} == added
    assert writes(audit_log, team, about)[before:] == []
    # Nor does a correction of the same object take them.
    patch(team, "sa/account-engine", {"automountServiceAccountToken": True})
    before_a_resync(
        "the token is off again",
        lambda: not team.json("get", "sa/account-engine")["automountServiceAccountToken"],
    )
    account = team.json("get", "sa/account-engine")
    assert {key: account.get(key) for key in added} == added


def test_children_that_were_left_behind_are_adopted_as_they_run(team: Kubectl) -> None:
    start_service(team, "orphan", networkPolicy={"enabled": True})
    uids = {
        kind: team.json("get", kind, name)["metadata"]["uid"]
        for kind, name in CHILDREN_OF_ORPHAN.items()
    }
    team.run("delete", "llms/orphan", "--cascade=orphan")
    start_service(team, "orphan")
    owner = team.json("get", "llms/orphan")["metadata"]["uid"]
    for kind, name in CHILDREN_OF_ORPHAN.items():
        metadata = team.json("get", kind, name)["metadata"]
        assert metadata["uid"] == uids[kind]
        assert [owner["uid"] for owner in metadata["ownerReferences"]] == [owner]
    # Which would close the pods of a service that asks for none.
    wait_until(
        "no policy is left",
        lambda: team.get("networkpolicy", "orphan-engine") is None,
    )


CHILDREN_OF_ORPHAN = {"deploy": "orphan-engine", "service": "orphan", "sa": "orphan-engine"}


def test_children_that_a_backup_put_back_are_adopted(team: Kubectl) -> None:
    """A backup keeps labels and managed fields, and makes new objects."""
    start_service(team, "backup")
    saved = team.json("get", "deploy/backup-engine", "--show-managed-fields")
    team.run("delete", "llms/backup")
    wait_until("gone", lambda: not deployment(team, "backup"))
    for key in ("uid", "resourceVersion", "ownerReferences", "creationTimestamp"):
        del saved["metadata"][key]
    team.run("create", "-f", "-", stdin=json.dumps(saved))
    start_service(team, "backup")
    (owner,) = deployment(team, "backup")["metadata"]["ownerReferences"]
    assert owner["uid"] == team.json("get", "llms/backup")["metadata"]["uid"]


def test_quick_edits_of_a_deployment_are_corrected_and_never_end_in_a_refusal(
    team: Kubectl, team_operator: OperatorProcess
) -> None:
    start_service(team, "edits")
    before = deployment(team, "edits")["spec"]["template"]
    edits = [
        subprocess.Popen(
            team.command(
                "patch", "deploy/edits-engine", "--type=merge", "-p",
                json.dumps({"spec": {"minReadySeconds": number}}),
            ),
            stdout=subprocess.DEVNULL,
        )
        for number in range(1, 25)
    ]  # fmt: skip
    reasons = set()
    while any(edit.poll() is None for edit in edits):
        service = team.get("llms", "edits") or {}
        reasons.add(condition(service, "Stalled").get("reason"))
    wait_until(
        "the Deployment as it was",
        lambda: (
            "minReadySeconds" not in deployment(team, "edits")["spec"]
            and deployment(team, "edits")["spec"]["template"] == before
        ),
        on_timeout=lambda: team_operator.log,
    )
    assert "Refused" not in reasons
    assert "server rejected our request" not in team_operator.log


def scale_of(kubectl: Kubectl, name: str) -> dict[str, Any]:
    path = f"/apis/pagoda.dev/v1alpha1/namespaces/{kubectl.namespace}/llmservices/{name}/scale"
    found: dict[str, Any] = json.loads(kubectl.run("get", "--raw", path))
    return found


def server_side(kubectl: Kubectl, document: dict[str, Any]) -> None:
    flags = ("--server-side", "--field-manager=gitops", "-f", "-")
    kubectl.run("apply", *flags, stdin=json.dumps(document))


@pytest.mark.parametrize("bounds", [{}, {"driver": "External", "maxReplicas": 2}], ids=str)
def test_a_service_without_replicas_can_be_scaled_by_an_autoscaler(
    team: Kubectl, bounds: dict[str, Any]
) -> None:
    name = "hpa-bounded" if bounds else "hpa"
    start_service(team, name, **({"autoscaling": bounds} if bounds else {}))
    scale = scale_of(team, name)
    assert scale["spec"]["replicas"] == 1
    assert f"pagoda.dev/service={name}" in scale["status"]["selector"]
    target = {"apiVersion": "pagoda.dev/v1alpha1", "kind": "LLMService", "name": name}
    spec = {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3}
    kind = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    team.apply({**kind, "metadata": {"name": name}, "spec": spec})

    def able() -> bool:
        found = condition(team.get("hpa", name) or {}, "AbleToScale")
        return found.get("status") == "True"

    wait_until("the autoscaler scales", able)
    wait_until(
        "its least number",
        lambda: deployment(team, name)["spec"]["replicas"] == 2,
    )
    if bounds:
        team.run("delete", "hpa", name)
        team.run("scale", f"llms/{name}", "--replicas=9")
        time.sleep(1)
        assert deployment(team, name)["spec"]["replicas"] == 2


@pytest.mark.parametrize("way", ["client-side", "server-side"])
def test_a_manifest_without_replicas_that_is_applied_again_keeps_what_was_scaled(
    team: Kubectl, way: str
) -> None:
    name = f"git-{way}"
    apply = team.apply if way == "client-side" else lambda document: server_side(team, document)
    apply(manifest(name))
    team.run("scale", f"llms/{name}", "--replicas=3")
    generation = team.json("get", f"llms/{name}")["metadata"]["generation"]
    apply(manifest(name))
    service = team.json("get", f"llms/{name}")
    assert (service["spec"]["replicas"], service["metadata"]["generation"]) == (3, generation)
    wait_until(
        "three replicas",
        lambda: (deployment(team, name) or {"spec": {}})["spec"].get("replicas") == 3,
    )


def test_autoscaling_wins_over_replicas_and_says_so(team: Kubectl) -> None:
    start_service(team, "both", autoscaling={"maxReplicas": 4})
    assert active(team)["status"] == "True"
    team.run("scale", "llms/both", "--replicas=3")
    wait_until(
        "what has no effect is said",
        lambda: active(team).get("reason") == "ReplicasIgnored",
    )
    assert active(team)["status"] == "True"
    assert "spec.replicas: 3, set by kubectl, has no effect" in active(team)["message"]
    assert scale_of(team, "both")["spec"]["replicas"] == 3
    assert deployment(team, "both")["spec"]["replicas"] == 1
    # A manifest with autoscaling is taken after `kubectl scale`, and one with both as well.
    team.apply(manifest("both", autoscaling={"maxReplicas": 5}))
    team.apply(manifest("both", autoscaling={"maxReplicas": 5}, replicas=2))
    time.sleep(1)
    assert deployment(team, "both")["spec"]["replicas"] == 1


def active(kubectl: Kubectl) -> dict[str, Any]:
    return condition(kubectl.get("llms", "both") or {}, "AutoscalingActive")


class Rival:
    """Another controller: whenever its change is gone, it makes it again."""

    def __init__(self, kubectl: Kubectl, child: str, change: dict[str, Any]) -> None:
        self._kubectl, self._child, self._change = kubectl, child, change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Rival:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        # A patch that changes nothing is no write.
        while not self._stop.wait(0.1):
            patch(self._kubectl, self._child, self._change, "--field-manager=rival")


def test_restarts_by_kubectl_are_no_fight(team: Kubectl, team_operator: OperatorProcess) -> None:
    start_service(team, "restarts")
    reasons = set()
    for _ in range(4):
        # kubectl refuses a second restart within a second.
        time.sleep(1.1)
        team.run("rollout", "restart", "deploy/restarts-engine")
        reasons.add(condition(team.get("llms", "restarts") or {}, "Stalled").get("reason"))
    time.sleep(1)
    reasons.add(condition(team.get("llms", "restarts") or {}, "Stalled").get("reason"))
    template = deployment(team, "restarts")["spec"]["template"]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    assert "Contested" not in reasons, team_operator.log


FIGHT_SECONDS = 6
TOLERATION = {"spec": {"template": {"spec": {"tolerations": [{"operator": "Exists"}]}}}}
FIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "toleration": (TOLERATION, "rival sets spec.template.spec.tolerations of Deployment"),
    "replicas": ({"spec": {"replicas": 5}}, "rival sets spec.replicas of Deployment"),
}


@pytest.mark.parametrize("fight", FIGHTS)
def test_a_fight_with_another_manager_costs_few_writes_and_is_said(
    team: Kubectl, audit_log: AuditLog, fight: str
) -> None:
    change, words = FIGHTS[fight]
    name = f"fight-{fight}"
    start_service(team, name)
    about = f" {name}-engine"
    before = len(writes(audit_log, team, about))
    with Rival(team, f"deploy/{name}-engine", change):
        time.sleep(FIGHT_SECONDS)
        found = writes(audit_log, team, about)[before:]
        # The third correction brings it, and that is late on a busy machine.
        wait_until("it is said", lambda: ready_reason(team, name) == "Contested")
        stalled = condition(team.json("get", "llms", name), "Stalled")
    # Corrections after 0, 1 and 3 seconds, of two writes each, and a race that was lost.
    assert len(found) <= 9
    assert (stalled["status"], stalled["reason"]) == ("True", "Contested")
    assert words.lower() in stalled["message"].lower()


def test_a_cluster_wide_operator_leaves_a_namespace_with_an_operator_of_its_own_alone(
    target: stack.Target, team: Kubectl, audit_log: AuditLog, tmp_path: Path
) -> None:
    # Other services of this cluster keep the engines that they have.
    image = installed_engine_image(target.kubectl) or "pagoda.invalid/another:1"
    wide = OperatorProcess(team, tmp_path / "wide.log", is_cluster_wide=True, engine_image=image)
    start_service(team, "two")
    wide.start()
    try:
        words = f"serves the namespace {team.namespace} alone"
        wait_until("it is said", lambda: words in wide.log)
        before = len(writes(audit_log, team, " two"))
        team.run("annotate", "llms/two", "a=b")
        time.sleep(4)
        assert writes(audit_log, team, " two")[before:] == []
        container = deployment(team, "two")["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == ENGINE_IMAGE
    finally:
        assert wide.stop() == 0


def test_a_second_operator_of_a_namespace_stands_by_and_says_for_whom(
    team: Kubectl, team_operator: OperatorProcess, tmp_path: Path
) -> None:
    second = OperatorProcess(team, tmp_path / "second.log")
    second.start(wait=False)
    try:
        words = f"serves the namespace {team.namespace} (Lease {team.namespace}/pagoda-operator)"
        wait_until("it stands by", lambda: words in second.readiness())
        assert f"standing by: the operator {team_holder(team)} {words}" in second.log
        wait_until("the first", lambda: team_operator.readiness() == "ok", timeout_seconds=20)
    finally:
        second.kill()


def team_holder(kubectl: Kubectl) -> str:
    return str(kubectl.json("get", "lease/pagoda-operator")["spec"]["holderIdentity"])
