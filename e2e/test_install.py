"""The ways to install: Helm on an empty API server, kustomize, and examples for other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stack
import yaml
from charts import access, helm, render
from cluster.control_plane import control_plane
from cluster.lifecycle import paths
from cluster.settings import environment_settings
from kube import Kubectl, KubectlError

from pagoda_operator.inspection import is_for_job, render_inspection
from pagoda_operator.render import render_children
from pagoda_operator.spec import parse

pytestmark = pytest.mark.cluster

EXAMPLES = stack.ROOT / "examples" / "install"
CRD = "llmservices.pagoda.dev"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """kubectl for an API server that nobody has installed anything on."""
    folder = tmp_path_factory.mktemp("plane")
    with control_plane(replace(environment_settings(), state=folder)) as settings:
        found = paths(settings)
        yield Kubectl(found["kubectl"], kubeconfig=found["kubeconfig"])


def install(target: stack.Target, kubectl: Kubectl, release: str, *values: str) -> str:
    """What helm says to a release in kubectl's namespace."""
    flags = [*access(kubectl), "--create-namespace"]
    flags += [part for value in values for part in ("--set-json", value)]
    done = helm(target, "upgrade", "--install", release, str(stack.CHART), *flags)
    return " ".join((done.stdout + done.stderr).split())


def test_a_crd_has_one_release_and_outlives_it_with_all_services(
    target: stack.Target, empty: Kubectl
) -> None:
    first, team = empty.in_namespace("pagoda-system"), empty.in_namespace("team")
    said = install(target, first, "pagoda")
    assert "STATUS: deployed" in said
    assert "keeps the CustomResourceDefinition, all LLMServices and their engines" in said
    watched = 'watchNamespace="team"'
    assert "invalid ownership metadata" in install(target, team, "second", watched)
    said = install(target, team, "second", watched, "crds.install=false")
    assert "STATUS: deployed" in said
    assert "kubectl delete llms --all -n team" in said

    team.run("apply", "-f", str(stack.ROOT / "examples" / "minimal.yaml"))
    uid = team.json("get", "llmservice", "chat")["metadata"]["uid"]
    for kubectl, release in ((first, "pagoda"), (team, "second")):
        done = helm(target, "uninstall", release, *access(kubectl))
        assert done.returncode == 0, done.stderr
        assert (CRD in done.stdout) is (release == "pagoda")
    assert team.json("get", "llmservice", "chat")["metadata"]["uid"] == uid
    assert "STATUS: deployed" in install(target, first, "pagoda")


def pod_templates(target: stack.Target) -> Iterator[dict[str, Any]]:
    """Of the chart, and of all that the operator makes of the examples."""
    for files in ([], [EXAMPLES / "openshift-values.yaml"]):
        for found in render(target, files=files):
            if found["kind"] == "Deployment":
                yield found["spec"]["template"]
    for path in sorted((stack.ROOT / "examples").glob("*.yaml")):
        document = yaml.safe_load(path.read_text())
        document["metadata"] |= {"namespace": "strict", "uid": "uid", "generation": 1}
        service = parse(document)
        children = [*render_children(service, engine_image="engine:1").values()]
        if is_for_job(service):
            children.append(render_inspection(service, "operator:1"))
        for found in children:
            if found["kind"] in ("Deployment", "Job"):
                yield found["spec"]["template"]


def test_every_pod_is_taken_where_pod_security_is_restricted(
    target: stack.Target, empty: Kubectl
) -> None:
    strict = empty.in_namespace("strict")
    strict.run("create", "namespace", "strict")
    level = "pod-security.kubernetes.io/enforce=restricted"
    strict.run("label", "namespace", "strict", level)
    stack.wait_for_account(strict)
    pods = []
    for number, template in enumerate(pod_templates(target)):
        # A pod, as the Deployment's or Job's controller would make it of the template.
        spec = {key: it for key, it in template["spec"].items() if key != "serviceAccountName"}
        metadata = {**template.get("metadata", {}), "name": f"pod-{number}"}
        pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": pods})
    flags = ("--dry-run=server", "--validate=strict")
    said = strict.run("create", *flags, "-f", "-", stdin=text)
    assert said.count("created (server dry run)") == len(pods) > 10
    del pods[0]["spec"]["securityContext"]
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        strict.run("create", *flags, "-f", "-", stdin=json.dumps(pods[0]))


def test_openshifts_values_leave_the_user_to_the_platform(target: stack.Target) -> None:
    objects = render(target, files=[EXAMPLES / "openshift-values.yaml"])
    (found,) = (i for i in objects if i["kind"] == "Deployment")
    security = found["spec"]["template"]["spec"]["securityContext"]
    assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_the_kustomization_has_the_registrys_images_and_is_taken(empty: Kubectl) -> None:
    text = empty.run("kustomize", str(EXAMPLES / "kustomize"))
    (found,) = (i for i in yaml.safe_load_all(text) if i["kind"] == "Deployment")
    (container,) = found["spec"]["template"]["spec"]["containers"]
    registry = "registry.example.com/pagoda"
    assert container["image"] == f"{registry}/pagoda-operator:v1"
    assert f"--engine-image={registry}/pagoda-runtime:v1" in container["args"]
    flags = ("--server-side", "--force-conflicts", "--validate=strict")
    system = empty.in_namespace("pagoda-system")
    said = system.run("apply", *flags, "-k", str(EXAMPLES / "kustomize"))
    assert "deployment.apps/pagoda-operator serverside-applied" in said


def helm_source(example: str) -> tuple[str, dict[str, Any]]:
    """The chart's folder and its values, as an example of another tool names them."""
    objects = [*yaml.safe_load_all((EXAMPLES / example).read_text())]
    for found in objects:
        if found["kind"] == "Application":
            source = found["spec"]["source"]
            return source["path"], source["helm"]["valuesObject"]
        if found["kind"] == "HelmRelease":
            return found["spec"]["chart"]["spec"]["chart"], found["spec"]["values"]
    raise AssertionError(f"{example} installs no chart")


@pytest.mark.parametrize("example", ["argocd.yaml", "flux.yaml"])
def test_a_gitops_example_names_the_chart_and_values_that_it_takes(
    target: stack.Target, example: str, tmp_path: Path
) -> None:
    folder, values = helm_source(example)
    assert (stack.ROOT / folder).resolve() == stack.CHART
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    (found,) = (i for i in render(target, files=[file]) if i["kind"] == "Deployment")
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == values["image"]
