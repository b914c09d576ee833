"""A claim is filled with the model before engines of it start."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagoda_operator.names import KIND, Manifest, common_labels, selector_labels
from pagoda_operator.poll import Poller
from pagoda_operator.preload import render_preload
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.render import render_children, render_deployment
from pagoda_operator.telemetry import Telemetry
from pagoda_operator.testing import KEY, MemoryCluster, make_manifest, make_pod, make_service

CACHE = {"pvc": {"claimName": "hub"}, "preload": True}
SPEC: dict[str, Any] = {"model": {"uri": "hf://org/first"}, "cache": CACHE}
OTHER = {**SPEC, "model": {"uri": "hf://org/second"}}


def job(spec: dict[str, Any] = SPEC) -> Manifest:
    return render_preload(make_service(spec), "engine:1")


def test_the_job_fetches_the_model_into_the_claim_with_what_the_hub_asks_for() -> None:
    model = {"uri": "hf://a/b", "revision": "v1", "credentialsSecretRef": {"name": "hub"}}
    template = job({**SPEC, "model": model, "auth": {"apiKeysSecretRef": {"name": "keys"}}})
    pod = template["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["pull", "hf://a/b", "--revision", "v1"]
    assert "HF_TOKEN" in [variable["name"] for variable in container["env"]]
    assert [volume["name"] for volume in pod["volumes"]] == ["tmp", "cache"]
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "hub"}
    assert container["volumeMounts"][1] == {"name": "cache", "mountPath": "/cache"}


def test_the_job_has_the_engines_security_and_node_but_no_gpu_and_no_requests_of_clients() -> None:
    spec = {
        **SPEC,
        "resources": {"gpu": {"products": ["NVIDIA-H200"]}, "queueName": "team"},
        "podTemplate": {"tolerations": [{"operator": "Exists"}], "labels": {"team": "a"}},
    }
    engine = render_deployment(make_service(spec), engine_image="engine:1")["spec"]["template"]
    template = job(spec)["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    for field in ("securityContext", "affinity", "tolerations", "serviceAccountName"):
        assert pod[field] == engine["spec"][field]
    (of_engine,) = engine["spec"]["containers"]
    assert container["securityContext"] == of_engine["securityContext"]
    assert set(container["resources"]["limits"]) == {"memory"}
    assert not [field for field in container if field.endswith("Probe") or field == "ports"]
    labels = template["metadata"]["labels"]
    assert labels["team"] == "a"
    assert "kueue.x-k8s.io/queue-name" not in labels
    assert not selector_labels(KEY.name).items() <= labels.items()


def test_another_model_is_another_job_of_a_name_that_fits_its_pods() -> None:
    assert job()["metadata"]["name"] == job({**SPEC, "suspend": True})["metadata"]["name"]
    assert job()["metadata"]["name"] != job(OTHER)["metadata"]["name"]
    assert len(job()["metadata"]["name"]) - len(KEY.name) + 50 <= 63


def test_a_service_that_does_not_ask_has_no_job() -> None:
    for cache in ({}, {"pvc": {"claimName": "hub"}}):
        service = make_service({**SPEC, "cache": cache})
        children = render_children(service, engine_image="engine:1")
        assert "Job" not in {ref.kind for ref in children}


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


@pytest.fixture
def reconciler(cluster: MemoryCluster) -> Reconciler:
    poller = Poller(clock=lambda: 0.0, on_change=lambda _: None, telemetry=Telemetry())
    return Reconciler(cluster, poller, engine_image="engine:1")


async def settle(reconciler: Reconciler) -> None:
    for _ in range(3):
        await reconciler.reconcile(KEY)


def jobs(cluster: MemoryCluster) -> list[Manifest]:
    return [item for (kind, _), item in cluster.objects.items() if kind == "Job"]


def complete(found: Manifest) -> None:
    found["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}


def model_of(cluster: MemoryCluster) -> str:
    deployment = cluster.find("Deployment", "chat-engine")
    args = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return str(args[args.index("--model") + 1])


def ready(cluster: MemoryCluster) -> Manifest:
    conditions = cluster.find(KIND, "chat")["status"]["conditions"]
    return next(dict(entry) for entry in conditions if entry["type"] == "Ready")


async def test_engines_start_when_the_claim_is_full(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest(SPEC))
    await settle(reconciler)
    assert ("Deployment", "chat-engine") not in cluster.objects
    assert ready(cluster)["reason"] == "Preloading"
    (found,) = jobs(cluster)
    complete(found)
    await settle(reconciler)
    assert model_of(cluster) == "hf://org/first"
    written = len(cluster.writes)
    await settle(reconciler)
    assert len(cluster.writes) == written


async def test_engines_go_on_with_their_model_until_the_next_one_is_there(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest(SPEC))
    await settle(reconciler)
    complete(jobs(cluster)[0])
    await settle(reconciler)
    cluster.put(make_manifest({**OTHER, "replicas": 3}, generation=2))
    await settle(reconciler)
    (found,) = jobs(cluster)
    assert found["metadata"]["name"] == job(OTHER)["metadata"]["name"]
    assert model_of(cluster) == "hf://org/first"
    assert cluster.find("Deployment", "chat-engine")["spec"]["replicas"] == 3
    complete(found)
    await settle(reconciler)
    assert model_of(cluster) == "hf://org/second"


async def test_what_hinders_the_job_is_what_the_service_says(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest(SPEC))
    await settle(reconciler)
    words = json.dumps({"reason": "ModelAccessDenied", "message": "set HF_TOKEN"})
    last = {"lastState": {"terminated": {"exitCode": 1, "message": words}}}
    pod = make_pod("", name="loader", container=last)
    pod["metadata"]["labels"] = {
        **common_labels(KEY.name),
        "app.kubernetes.io/component": "preload",
        "batch.kubernetes.io/job-name": jobs(cluster)[0]["metadata"]["name"],
    }
    cluster.put(pod)
    await settle(reconciler)
    assert (ready(cluster)["reason"], ready(cluster)["message"]) == (
        "ModelAccessDenied",
        "set HF_TOKEN",
    )
    cluster.find("Pod", "loader")["status"]["phase"] = "Succeeded"
    await settle(reconciler)
    assert ready(cluster)["reason"] == "Preloading"


async def test_a_suspended_service_is_suspended_and_loads_nothing(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest({**SPEC, "suspend": True}))
    await settle(reconciler)
    assert jobs(cluster)[0]["spec"]["suspend"] is True
    assert (ready(cluster)["reason"], ready(cluster)["status"]) == ("Suspended", "True")
