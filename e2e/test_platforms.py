"""The operator on platforms that add to every object: meshes, policies, GitOps, queues, backups."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from audit import AuditLog
from kube import Kubectl, condition, wait_until
from mutations import MUTATIONS, mutating
from operator_process import OperatorProcess
from services import deployment, manifest, ready_reason, start_service

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("team_operator"),
]

CHILDREN = ("serviceaccounts", "services", "deployments")
EDIT = {"engine": {"maxNumSeqs": 7}}


def writes(audit_log: AuditLog, kubectl: Kubectl, service: str) -> Counter[str]:
    """How often the operator wrote each child of a service."""
    return Counter(
        f"{request.resource}/{request.subresource} {request.name}"
        for request in audit_log.requests(kubectl.namespace)
        if request.is_by_operator
        and request.is_write
        # What was refused has changed nothing, and is sent again.
        and request.status < 300
        and request.resource in CHILDREN
        and request.name.startswith(service)
    )


def children(kubectl: Kubectl, name: str) -> str:
    """Everything that belongs to a service, as text."""
    kinds = ",".join([*CHILDREN, "networkpolicies", "replicasets", "pods"])
    return json.dumps(kubectl.items(kinds, "-l", f"pagoda.dev/service={name}"))


SERVICES = {f"mutated-{number}": mutation for number, mutation in enumerate(MUTATIONS)}
MARKS = {
    "a sidecar in pods": "proxy:1",
    "a sidecar in the template": "proxy:1",
    "a toleration as default": '"key": "team"',
    "labels and annotations": "team.dev/checked",
    "Kueue's gate": "kueue.x-k8s.io/admission",
}


def test_what_admission_adds_stays_and_is_written_once(
    team: Kubectl, team_operator: OperatorProcess, audit_log: AuditLog
) -> None:
    queued = {name: mutation == "Kueue's gate" for name, mutation in SERVICES.items()}
    # Auto would write the Deployment twice more, for a rollout that finds no room.
    specs: dict[str, dict[str, Any]] = {
        name: {"rollout": {"strategy": "Recreate"}} for name in SERVICES
    }
    for name, is_queued in queued.items():
        specs[name] |= {"resources": {"queueName": "team"}} if is_queued else {}
    with mutating(team, SERVICES):
        for name, spec in specs.items():
            team.apply(manifest(name, **spec))
        wait_for_reasons(team, queued)
        for name, spec in specs.items():
            team.apply(manifest(name, **spec, **EDIT))
        wait_until(
            "the edits",
            lambda: all('"--max-num-seqs", "7"' in children(team, name) for name in SERVICES),
        )
        wait_for_reasons(team, queued)
        time.sleep(2)
        for name, mutation in SERVICES.items():
            found = writes(audit_log, team, name)
            # Made and edited; a Service and an account are made.
            assert max(found.values()) <= 2, found
            assert MARKS[mutation] in children(team, name), mutation
        # A restarted operator applies each child once, which changes nothing.
        versions = resource_versions(team)
        assert team_operator.stop() == 0
        team_operator.start()
        time.sleep(2)
        assert resource_versions(team) == versions


def wait_for_reasons(kubectl: Kubectl, queued: dict[str, bool]) -> None:
    for name, is_queued in queued.items():
        wait_until(
            f"{name} waits",
            lambda name=name, is_queued=is_queued: (
                ready_reason(kubectl, name) == ("Queued" if is_queued else "InsufficientGPU")
            ),
            on_timeout=lambda name=name: json.dumps(kubectl.json("get", f"llms/{name}")["status"]),
        )


def resource_versions(kubectl: Kubectl) -> dict[str, str]:
    """Of the children: a write that changes nothing leaves them."""
    items = kubectl.items(",".join(CHILDREN), "-l", "pagoda.dev/service")
    return {
        f"{item['kind']} {item['metadata']['name']}": item["metadata"]["generation"]
        if item["kind"] == "Deployment"
        else item["metadata"]["resourceVersion"]
        for item in items
    }


GITOPS = {
    "argocd": (
        {"app.kubernetes.io/instance": "an-app", "argocd.argoproj.io/instance": "an-app"},
        {"argocd.argoproj.io/tracking-id": "an-app:pagoda.dev/LLMService:ns/argocd"},
    ),
    "flux": (
        {
            "kustomize.toolkit.fluxcd.io/name": "apps",
            "kustomize.toolkit.fluxcd.io/namespace": "flux-system",
        },
        {"kustomize.toolkit.fluxcd.io/prune": "disabled"},
    ),
    "helm": (
        {"app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "models-1"},
        {"meta.helm.sh/release-name": "models", "meta.helm.sh/release-namespace": "ns"},
    ),
}


def test_what_gitops_marks_an_llmservice_with_is_not_given_to_its_children(
    team: Kubectl, audit_log: AuditLog
) -> None:
    documents = []
    for name, (labels, marks) in GITOPS.items():
        document = manifest(name)
        document["metadata"] |= {"labels": labels, "annotations": dict(marks)}
        documents.append(document)
        server_side(team, document, name)
    for name, (labels, marks) in GITOPS.items():
        wait_until(
            "its children",
            lambda name=name: ready_reason(team, name) == "InsufficientGPU",
        )
        # A tool that finds its marks on what is not in its repository deletes it.
        text = children(team, name)
        for mark in [*labels.values(), *marks]:
            assert f'"{mark}"' not in text
    before = {name: writes(audit_log, team, name) for name in GITOPS}
    for document in documents:
        # The next synchronization, with another mark.
        document["metadata"]["annotations"]["sync"] = "2"
        server_side(team, document, document["metadata"]["name"])
    time.sleep(2)
    assert {name: writes(audit_log, team, name) for name in GITOPS} == before
    for name, (labels, _) in GITOPS.items():
        assert team.json("get", f"llms/{name}")["metadata"]["labels"] == labels


def server_side(kubectl: Kubectl, document: dict[str, Any], manager: str) -> None:
    flags = ("--server-side", f"--field-manager={manager}", "-f", "-")
    kubectl.run("apply", *flags, stdin=json.dumps(document))


def keeps_managed_fields(saved: dict[str, Any]) -> dict[str, Any]:
    return {"managedFields": saved["metadata"]["managedFields"]}


@pytest.mark.parametrize("kept", [keeps_managed_fields, lambda saved: {}], ids=["kept", "lost"])
def test_what_velero_restores_is_adopted_as_it_is(
    team: Kubectl, audit_log: AuditLog, kept: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """It gives objects other uids, its labels, no owner and no status; children come first."""
    name = "restored-kept" if kept is keeps_managed_fields else "restored-lost"
    start_service(team, name, networkPolicy={"enabled": True})
    paths = (
        f"serviceaccount/{name}-engine",
        f"deployment/{name}-engine",
        f"networkpolicy/{name}-engine",
        f"service/{name}",
        f"llms/{name}",
    )
    saved = [team.json("get", path, "--show-managed-fields") for path in paths]
    team.run("delete", f"llms/{name}")
    wait_until("gone", lambda: children(team, name) == "[]")
    for item in saved:
        metadata = item["metadata"]
        labels = {**metadata.get("labels", {}), **RESTORED}
        item.pop("status", None)
        item.get("spec", {}).pop("clusterIP", None)
        item.get("spec", {}).pop("clusterIPs", None)
        kept_metadata = {
            "name": metadata["name"],
            "labels": labels,
            "annotations": metadata.get("annotations", {}),
            **kept({"metadata": metadata}),
        }
        restored = {**item, "metadata": kept_metadata}
        team.run("create", "-f", "-", stdin=json.dumps(restored))
    uids = {path: team.json("get", path)["metadata"]["uid"] for path in paths}
    wait_until(
        "a status",
        lambda: ready_reason(team, name) == "InsufficientGPU",
        on_timeout=lambda: json.dumps(team.json("get", f"llms/{name}")["status"]),
    )
    *made, service = paths
    for path in made:
        metadata = team.json("get", path)["metadata"]
        assert (metadata["uid"], path) == (uids[path], path)
        assert [owner["uid"] for owner in metadata["ownerReferences"]] == [uids[service]]
        assert RESTORED.items() <= metadata["labels"].items()
    time.sleep(1)
    # Its fields are taken over, and it is applied.
    assert max(writes(audit_log, team, name).values()) <= 3


RESTORED = {"velero.io/backup-name": "nightly", "velero.io/restore-name": "nightly-1"}


def test_keda_writes_the_scale_subresource_within_bounds(
    team: Kubectl, audit_log: AuditLog
) -> None:
    """Its operator writes 0 and 1 there, an autoscaler of its own the rest."""
    start_service(team, "keda", autoscaling={"driver": "External", "maxReplicas": 3})
    for asked, replicas in ((2, 2), (3, 3), (0, 1)):
        # Writes the subresource, and again if the status was written meanwhile, as KEDA does.
        team.run("scale", "llms/keda", f"--replicas={asked}")
        wait_until(
            f"{replicas} replicas",
            lambda wanted=replicas: deployment(team, "keda")["spec"]["replicas"] == wanted,
        )

    def said() -> bool:
        active = condition(team.json("get", "llms/keda"), "AutoscalingActive")
        assert (active["status"], active["reason"]) == ("Unknown", "External")
        return "spec.replicas: 0 is out of bounds; 1 are kept" in active["message"]

    wait_until("the bound is said", said)
    # Made, and scaled three times.
    assert writes(audit_log, team, "keda")["deployments/ keda-engine"] <= 4
