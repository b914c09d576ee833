"""The chart: one release or several, and values that are refused where they are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifests
import pytest
import stack
import yaml
from charts import access, helm, render
from kube import Kubectl, condition, wait_until
from llmservices import manifest
from operator_process import (
    ENGINE_IMAGE,
    OperatorProcess,
    installed_engine_image,
    without_installed_operator,
)

from pagoda_operator.names import CHILD_KINDS

pytestmark = pytest.mark.cluster


def operator_container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (item for item in documents if item["kind"] == "Deployment")
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


def operator_arguments(documents: list[dict[str, Any]]) -> list[str]:
    arguments: list[str] = operator_container(documents)["args"]
    return arguments


@pytest.mark.parametrize("empty", ['""', "null"])
def test_an_empty_namespace_means_all_of_them_for_rights_and_operator_alike(
    target: stack.Target, empty: str
) -> None:
    documents = render(target, f"watchNamespace={empty}")
    kinds = {item["kind"] for item in documents}
    assert {"ClusterRole", "ClusterRoleBinding"} <= kinds
    assert not {"Role", "RoleBinding"} & kinds
    assert not any(flag.startswith("--namespace") for flag in operator_arguments(documents))


def test_one_namespace_has_a_role_there_and_the_operator_watches_it(target: stack.Target) -> None:
    documents = render(target, 'watchNamespace="team"')
    kinds = {item["kind"] for item in documents}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    roles = [item for item in documents if item["kind"] in ("Role", "RoleBinding")]
    assert [item["metadata"]["namespace"] for item in roles] == ["team", "team"]
    assert "--namespace=team" in operator_arguments(documents)


def test_the_release_pagoda_keeps_the_names_that_the_documentation_gives(
    target: stack.Target,
) -> None:
    named = {(item["kind"], item["metadata"]["name"]) for item in render(target)}
    assert {("Deployment", "pagoda-operator"), ("ServiceAccount", "pagoda-operator")} <= named


def test_a_second_replica_stands_by_on_another_node(target: stack.Target) -> None:
    one, two = render(target), render(target, "replicas=2")
    added = {"PodDisruptionBudget"}
    assert {item["kind"] for item in two} - {item["kind"] for item in one} == added
    (found,) = (item["spec"] for item in two if item["kind"] == "Deployment")
    # A pod that stands by is ready, so that a rollout goes on; none comes beside the two.
    assert found["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "--replica-of=pagoda-system/pagoda-operator" in operator_arguments(two)
    pod = found["template"]["spec"]
    assert next(it["topologyKey"] for it in pod["topologySpreadConstraints"]) == HOSTNAME
    assert {it["tolerationSeconds"] for it in pod["tolerations"]} == {30}
    assert not any(flag.startswith("--replica-of") for flag in operator_arguments(one))


HOSTNAME = "kubernetes.io/hostname"
BAD_VALUES = {
    "no replicas": ("replicas", "0", "replicas"),
    "a typo": ("watchNamespaces", '"team"', "watchNamespaces"),
    "a typo further down": ("resources", '{"limit": {"memory": "1Gi"}}', "limit"),
    "an unknown level": ("logLevel", '"verbose"', "logLevel"),
    "two namespaces": ("watchNamespace", '"a,b"', "watchNamespace"),
    "a secret's name without its key": ("imagePullSecrets", '["registry"]', "imagePullSecrets"),
    "root": ("runAsUser", "0", "runAsUser"),
    "no image": ("image", '""', "image"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_wrong_value_is_refused_by_its_name(target: stack.Target, case: str) -> None:
    name, value, words = BAD_VALUES[case]
    done = helm(target, "template", "pagoda", str(stack.CHART), "--set-json", f"{name}={value}")
    assert done.returncode != 0
    assert words in done.stderr


def test_helm_finds_nothing_to_say_of_the_chart(target: stack.Target) -> None:
    done = helm(target, "lint", "--strict", "--quiet", str(stack.CHART))
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_the_crd_comes_with_a_release_and_outlives_it_unless_another_has_it(
    target: stack.Target,
) -> None:
    (found,) = (i for i in render(target) if i["kind"] == "CustomResourceDefinition")
    assert found["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    crd = yaml.safe_load((stack.ROOT / "crds" / "llmservice.yaml").read_text())
    assert found["spec"] == crd["spec"]
    kinds = {item["kind"] for item in render(target, "crds.install=false")}
    assert "CustomResourceDefinition" not in kinds


def test_the_plain_manifests_are_those_of_the_chart(target: stack.Target) -> None:
    is_old = manifests.MANIFESTS.read_text() != manifests.render(target.helm)
    assert not is_old, "run `make manifests`: deploy/operator.yaml is not what the chart renders"


def test_an_operator_that_gets_its_request_of_cpu_alone_starts_before_it_is_killed(
    target: stack.Target,
) -> None:
    container = operator_container(render(target))
    probe = container["startupProbe"]
    assert container["resources"]["requests"]["cpu"] == "50m"
    needed_cpu_seconds = 3
    assert probe["periodSeconds"] * probe["failureThreshold"] * 0.05 >= needed_cpu_seconds


@pytest.fixture
def releases(target: stack.Target, namespace: Kubectl) -> Iterator[list[tuple[str, Kubectl]]]:
    """Three releases: one name in two namespaces, and a second name in one of them."""
    other = namespace.in_namespace(f"{namespace.namespace}-b")
    other.run("create", "namespace", other.namespace)
    found = [("pagoda", namespace), ("pagoda", other), ("second", other)]
    try:
        yield found
    finally:
        for release, kubectl in found:
            helm(target, "uninstall", release, *access(kubectl), "--ignore-not-found")
        other.run("delete", "namespace", other.namespace, "--wait=false")


def test_several_releases_live_side_by_side_each_with_the_rights_it_needs(
    target: stack.Target, releases: list[tuple[str, Kubectl]]
) -> None:
    for number, (release, kubectl) in enumerate(releases):
        # A namespace of its own, none, and none given as null.
        watched = [json.dumps(kubectl.namespace), '""', "null"][number]
        flags = ["--set-json", f"crds.install=false,watchNamespace={watched}"]
        done = helm(target, "install", release, str(stack.CHART), *access(kubectl), *flags)
        assert done.returncode == 0, done.stderr
    (first, namespaced), *cluster_wide = releases
    wait_until_may_list(namespaced, f"{first}-operator", namespaced.namespace)
    assert not may_list(namespaced, f"{first}-operator", None)
    for (_, kubectl), name in zip(
        cluster_wide, ("pagoda-operator", "second-pagoda-operator"), strict=True
    ):
        wait_until_may_list(kubectl, name, None)


@pytest.mark.parametrize("is_cluster_wide", [False, True], ids=["namespaced", "cluster-wide"])
def test_the_rights_of_a_release_are_enough_for_all_that_its_operator_does(
    target: stack.Target, namespace: Kubectl, tmp_path: Path, is_cluster_wide: bool
) -> None:
    operator = OperatorProcess(
        namespace,
        tmp_path / "log",
        is_cluster_wide=is_cluster_wide,
        # Other services of this cluster keep the engines that they have.
        engine_image=installed_engine_image(target.kubectl) or ENGINE_IMAGE,
    )
    with without_installed_operator(target.kubectl):
        operator.start()
        try:
            namespace.apply(manifest(EVERY_CHILD, name="chat"))
            wait_until(
                "a status",
                lambda: condition(namespace.get("llmservice", "chat") or {}, "Ready"),
                on_timeout=lambda: operator.log,
            )
            found = {item["kind"] for item in namespace.items(",".join(CHILD_KINDS), "-l", LABEL)}
            # With a Job there would be no Deployment yet; `test_preload` has it.
            assert found == set(CHILD_KINDS) - {"Job"}
            assert "forbidden" not in operator.log
        finally:
            operator.kill()


LABEL = "pagoda.dev/service=chat"
EVERY_CHILD = {"networkPolicy": {"enabled": True}, "replicas": 2}


def wait_until_may_list(kubectl: Kubectl, account: str, namespace: str | None) -> None:
    """The API server hears of new roles and bindings a moment after they are made."""
    wait_until(
        f"the rights of {account} in {namespace or 'all namespaces'}",
        lambda: may_list(kubectl, account, namespace),
    )


def may_list(kubectl: Kubectl, account: str, namespace: str | None) -> bool:
    """Whether the ServiceAccount may list LLMServices there (None: everywhere)."""
    spec = {
        "user": f"system:serviceaccount:{kubectl.namespace}:{account}",
        "resourceAttributes": {
            "group": "pagoda.dev",
            "resource": "llmservices",
            "verb": "list",
            **({"namespace": namespace} if namespace else {}),
        },
    }
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = kubectl.run("create", "-f", "-", "-o", "json", stdin=json.dumps(review))
    return bool(json.loads(answer)["status"]["allowed"])
