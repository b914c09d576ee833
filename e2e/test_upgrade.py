"""A release as it was at commit 2c9d34d becomes today's while clients ask, and then goes.

The old release is its own chart, CRD and operator (`old_release`), in a namespace of its own. Its
engines are today's, since an image of torch as of then is not kept: what is proven is that objects,
selectors and field owners of that release, and requests under way, survive.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import charts
import httpx
import old_release
import pytest
import stack
from kube import Kubectl, show_services, wait_ready, wait_until
from llmservices import manifest
from operator_process import without_installed_operator

from pagoda_operator.names import LABEL_REVISION

NAMESPACE = "e2e-upgrade"
NUM_CLIENTS = 2
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

CRD = "llmservices.pagoda.dev"
ANSWERED = {
    "model": {"uri": "pvc://models/gemma-3-270m"},
    "engine": {"maxModelLen": 512, "maxNumSeqs": 4, "extraArgs": ["--num-threads=1"]},
    "resources": {"gpu": {"count": 0}, "cpu": "300m", "memory": "3Gi"},
    "autoscaling": {"minReplicas": 1, "maxReplicas": 2, "targetQueueDepth": 4},
}
# No node has such a GPU: its objects are all there is of it.
PARKED = {"resources": {"gpu": {"resourceName": "e2e.pagoda.dev/none"}}, "replicas": 2}
CHILDREN = "deployments,services,serviceaccounts"


@dataclass(frozen=True, slots=True)
class Release:
    """The release `pagoda` of the test's namespace."""

    target: stack.Target
    kubectl: Kubectl
    images: dict[str, str]

    def helm(self, *arguments: str) -> str:
        done = charts.helm(self.target, *arguments, *charts.access(self.kubectl))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def put(self, chart: Path, operator: str, *flags: str) -> str:
        """Install or upgrade it, and wait until its operator is ready."""
        values = [f"image={operator}", f"engineImage={self.images['runtime']}"]
        values += [f"watchNamespace={self.kubectl.namespace}"]
        said = self.helm(
            *("upgrade", "--install", "pagoda", str(chart), "--set", ",".join(values), *flags)
        )
        self.kubectl.run(
            "rollout", "status", "deployment/pagoda-operator", "--timeout=240s", timeout_seconds=250
        )
        return said

    def uids(self, kinds: str) -> dict[str, str]:
        found = self.kubectl.items(kinds, "-l", "app.kubernetes.io/managed-by!=Helm")
        return {f"{it['kind']}/{it['metadata']['name']}": it["metadata"]["uid"] for it in found}

    def engines(self) -> set[str]:
        """The uids of the pods that answer."""
        found = self.kubectl.items("pods", "-l", "pagoda.dev/service=gemma")
        return {pod["metadata"]["uid"] for pod in found}

    def revision(self) -> str:
        """Of the pods that the Deployment asks for."""
        deployment = self.kubectl.json("get", "deployment", "gemma-engine")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        return str(labels[LABEL_REVISION])


@pytest.fixture
def release(target: stack.Target, images: dict[str, str], tmp_path: Path) -> Iterator[Release]:
    """The old release, with a service that answers and one that waits for its GPU."""
    if not target.is_local:
        pytest.skip("the old operator's image is made for the local registry")
    chart = old_release.unpack(tmp_path)
    operator = old_release.push_operator(tmp_path, images["operator"])
    with (
        stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl,
        without_installed_operator(kubectl),
    ):
        found = Release(target, kubectl, images)
        stack.ensure_model_volume(target, kubectl, images)
        try:
            old_release.apply_crds(target, chart)
            found.put(chart, operator, "--skip-crds")
            kubectl.apply(manifest(ANSWERED, name="gemma"))
            kubectl.apply(manifest(PARKED, name="parked"))
            wait_ready(kubectl, "gemma", 400)
            yield found
        finally:
            stack.apply_crds(kubectl)
            found.helm("uninstall", "pagoda", "--ignore-not-found")


@dataclass(slots=True)
class Asked:
    """What came of the questions: tokens of each answer, and how others failed."""

    answers: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def asked_all_the_time(url: str) -> Iterator[Asked]:
    """Clients on new connections, one question after the other."""
    stop, asked = threading.Event(), Asked()
    body = {"model": "gemma", "prompt": "The capital of France is", "max_tokens": 8}

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                with httpx.Client(timeout=120) as client:
                    found = client.post(f"{url}/v1/completions", json={**body, "ignore_eos": True})
                found.raise_for_status()
                asked.answers.append(found.json()["usage"]["completion_tokens"])
            except httpx.HTTPError as error:
                asked.failures.append(f"after {len(asked.answers)} answers: {error!r}")

    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        for _ in range(NUM_CLIENTS):
            pool.submit(keep_asking)
        try:
            yield asked
        finally:
            stop.set()


def test_a_release_of_long_ago_is_upgraded_under_load_and_uninstalled(release: Release) -> None:
    kubectl = release.kubectl
    url = f"http://{kubectl.json('get', 'service', 'gemma')['spec']['clusterIP']}"
    services, children = release.uids("llmservices"), release.uids(CHILDREN)
    old = release.engines()
    with asked_all_the_time(url) as asked:
        said = release.put(
            stack.CHART, release.images["operator"], *stack.ownership_flags(release.target)
        )
        assert "keeps the CustomResourceDefinition" in " ".join(said.split())
        assert crd_has(kubectl, "disruption")
        # Today's pods are others than those of then, so they are rolled.
        wait_until(
            "the pods of today alone",
            lambda: not old & release.engines(),
            timeout_seconds=400,
            on_timeout=lambda: show_services(kubectl),
        )
        wait_ready(kubectl, "gemma", 400)
        uids = release.uids("llmservices")
        assert services == uids
        assert children.items() <= release.uids(CHILDREN).items()
        # Another operator that wants the same pods restarts none.
        engines, revision = release.engines(), release.revision()
        release.put(stack.CHART, release.images["operator"], "--set", "logLevel=debug")
        wait_until_corrected(kubectl, "gemma-engine")
        assert release.revision() == revision
        assert release.engines() == engines
        num_answers = len(asked.answers)
        said = release.helm("uninstall", "pagoda")
        assert CRD in said
        wait_until(
            "answers after that",
            lambda: len(asked.answers) > num_answers + 2,
            timeout_seconds=120,
            on_timeout=lambda: f"{len(asked.answers)} answers, {asked.failures}",
        )
        assert release.uids("llmservices") == uids
    assert asked.failures == []
    assert set(asked.answers) == {8}
    print(f"{len(asked.answers)} answers, none failed")


def wait_until_corrected(kubectl: Kubectl, account: str) -> None:
    """Wait until the operator has compared all objects of a service with what they should be."""
    name = "app.kubernetes.io/name"
    kubectl.run("label", "serviceaccount", account, f"{name}=mine", "--overwrite")
    wait_until(
        "the label of before",
        lambda: (
            kubectl.json("get", "serviceaccount", account)["metadata"]["labels"][name] != "mine"
        ),
        timeout_seconds=30,
    )


def crd_has(kubectl: Kubectl, field: str) -> bool:
    (version,) = kubectl.json("get", "crd", CRD)["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return field in spec["properties"]
