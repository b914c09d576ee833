"""What the reconciler says where something keeps it from its work, over an API server in memory."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest

from pagoda_operator.cluster import ApiError, Refused, Unavailable
from pagoda_operator.names import Manifest
from pagoda_operator.poll import Poller
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.render import revision_of
from pagoda_operator.testing import (
    KEY,
    MemoryCluster,
    make_manifest,
    make_pod,
    set_deployment_status,
)

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def available(cluster: MemoryCluster) -> str:
    found = cluster.condition("Available")
    return f"{found['status']} {found['reason']}"


class FailingCluster(MemoryCluster):
    """Applies and lists fail with what is set; the status can be written."""

    on_apply: ApiError | None = None
    on_list: ApiError | None = None

    async def apply(self, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
        if self.on_apply is not None:
            raise self.on_apply
        return await super().apply(manifest, manager=manager, force=force)

    async def list(
        self, kind: str, namespace: str | None, selector: str = "", fields: str = ""
    ) -> list[Manifest]:
        if self.on_list is not None:
            raise self.on_list
        return await super().list(kind, namespace, selector, fields)


@pytest.fixture
async def serving(poller: Poller) -> tuple[FailingCluster, Reconciler]:
    """A service of one ready replica."""
    cluster = FailingCluster()
    reconciler = Reconciler(cluster, poller, engine_image="engine:1", now=lambda: NOW)
    cluster.put(make_manifest())
    await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)
    set_deployment_status(cluster.find("Deployment", "chat-engine"), ready=1, updated=1, total=1)
    await reconciler.reconcile(KEY)
    assert cluster.reason() == "Serving"
    return cluster, reconciler


async def test_an_error_of_the_api_server_is_told_and_left_to_the_queue(
    serving: tuple[FailingCluster, Reconciler],
) -> None:
    cluster, reconciler = serving
    cluster.on_apply = Unavailable("failed calling webhook policy.team.dev")
    cluster.edit({"engine": {"maxNumSeqs": 8}}, 2)
    with pytest.raises(Unavailable):
        await reconciler.reconcile(KEY)
    assert cluster.reason("Reconciling") == "ApiServerError"
    assert available(cluster) == "True ReplicasAvailable"
    before = len(cluster.writes)
    with pytest.raises(Unavailable):
        await reconciler.reconcile(KEY)
    assert len(cluster.writes) == before


@pytest.mark.parametrize("kind", [Unavailable, Refused])
async def test_what_differs_between_two_equal_errors_is_no_news(
    serving: tuple[FailingCluster, Reconciler], kind: type[ApiError]
) -> None:
    """Each write of the status is an event, which brings the service at once."""
    cluster, reconciler = serving
    cluster.edit({"engine": {"maxNumSeqs": 8}}, 2)
    writes = []
    for port, identifier in ((40102, "a1"), (51234, "b2")):
        cluster.on_apply = kind(
            f"read tcp 10.0.0.1:{port}->10.0.0.9:443: reset at 2026-11-21T10:00:{port % 60}Z "
            f"(request 6f1c2d3e-0000-4000-8000-0000000000{identifier})",
        )
        with contextlib.suppress(Unavailable):
            await reconciler.reconcile(KEY)
        writes.append(len(cluster.writes))
    assert "read tcp 10.0.0.1:…->10.0.0.9:443: reset" in cluster.condition("Ready")["message"]
    assert writes[0] == writes[1]


async def test_what_is_not_wanted_goes_also_where_the_first_pass_of_an_operator_fails(
    serving: tuple[FailingCluster, Reconciler], poller: Poller
) -> None:
    cluster, before = serving
    cluster.edit({"networkPolicy": {"enabled": True}}, 2)
    await before.reconcile(KEY)
    assert ("NetworkPolicy", "chat-engine") in cluster.objects
    cluster.edit({}, 3)
    restarted = Reconciler(cluster, poller, engine_image="engine:1", now=lambda: NOW)
    cluster.on_apply = Unavailable("failed calling webhook policy.team.dev")
    with pytest.raises(Unavailable):
        await restarted.reconcile(KEY)
    cluster.on_apply = None
    await restarted.reconcile(KEY)
    assert ("NetworkPolicy", "chat-engine") not in cluster.objects


async def test_a_status_that_cannot_be_written_either_does_not_hide_the_first_error(
    serving: tuple[FailingCluster, Reconciler], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, reconciler = serving

    async def refuse(manifest: Manifest, *, manager: str) -> Manifest:
        raise Unavailable("status")

    monkeypatch.setattr(cluster, "apply_status", refuse)
    cluster.on_apply = Unavailable("the first")
    cluster.edit({"engine": {"maxNumSeqs": 8}}, 2)
    with pytest.raises(Unavailable, match="the first"):
        await reconciler.reconcile(KEY)


@pytest.mark.parametrize(
    ("error", "generation", "told"),
    [
        (Unavailable("etcd is away"), 1, "Serving"),
        (Unavailable("etcd is away"), 2, "ApiServerError"),
        (Refused("may not list pods"), 1, "Refused"),
    ],
)
async def test_a_read_that_fails_once_unsays_nothing(
    serving: tuple[FailingCluster, Reconciler], error: ApiError, generation: int, told: str
) -> None:
    cluster, reconciler = serving
    cluster.on_list = error
    cluster.edit({}, generation)
    with pytest.raises(type(error)):
        await reconciler.reconcile(KEY)
    assert cluster.reason() == told


@pytest.mark.parametrize("how", ["refused", "conflict", "invalid"])
async def test_pods_that_go_while_nothing_can_be_written_are_not_available(
    serving: tuple[FailingCluster, Reconciler], how: str
) -> None:
    cluster, reconciler = serving
    cluster.edit({"router": {}} if how == "invalid" else {"engine": {"maxNumSeqs": 8}}, 2)
    if how == "refused":
        cluster.on_apply = Refused("a policy says no")
    if how == "conflict":
        cluster.find("ServiceAccount", "chat-engine")["metadata"]["ownerReferences"] = []
    await reconciler.reconcile(KEY)
    assert available(cluster) == "True ReplicasAvailable"
    set_deployment_status(cluster.find("Deployment", "chat-engine"), ready=0, updated=0, total=0)
    await reconciler.reconcile(KEY)
    assert available(cluster) == "False NoReadyReplica"
    assert cluster.find("LLMService", "chat")["status"]["summary"] == "0/1"


async def test_a_deployment_that_hangs_in_deletion_is_not_in_force(
    serving: tuple[FailingCluster, Reconciler],
) -> None:
    cluster, reconciler = serving
    metadata = cluster.find("Deployment", "chat-engine")["metadata"]
    metadata |= {"deletionTimestamp": "now", "finalizers": ["team.dev/keep"]}
    cluster.edit({"engine": {"maxNumSeqs": 8}}, 2)
    assert await reconciler.reconcile(KEY) is not None
    assert cluster.reason() == "WaitingForDeletion"
    assert available(cluster) == "True ReplicasAvailable"


async def test_of_the_pods_that_their_node_ended_the_last_three_are_kept(
    serving: tuple[FailingCluster, Reconciler],
) -> None:
    cluster, reconciler = serving
    for number in range(5):
        pod = make_pod("rev", name=f"evicted-{number}")
        pod["metadata"]["creationTimestamp"] = f"2026-01-0{number + 1}T00:00:00Z"
        pod["status"] = {"phase": "Failed", "reason": "Evicted"}
        cluster.put(pod)
    await reconciler.reconcile(KEY)
    deleted = sorted(name for verb, _, name in cluster.writes if verb == "delete")
    assert deleted == ["evicted-0", "evicted-1"]


async def test_a_pod_that_does_not_start_is_looked_at_again_and_explained(
    serving: tuple[FailingCluster, Reconciler],
) -> None:
    cluster, reconciler = serving
    deployment = cluster.find("Deployment", "chat-engine")
    set_deployment_status(deployment, ready=0, updated=1, total=1)
    pod = make_pod(revision_of(deployment), container={"state": {}})
    pod["status"]["phase"] = "Pending"
    pod["status"]["conditions"].append({"type": "PodScheduled", "status": "True"})
    pod["metadata"] |= {"uid": "uid-1", "creationTimestamp": "2026-11-20T23:59:40Z"}
    cluster.put(pod)
    event = {"involvedObject": {"uid": "uid-1"}, "reason": "FailedMount", "message": "no route"}
    cluster.put({"kind": "Event", "metadata": {"name": "e"}, **event})
    assert await reconciler.reconcile(KEY) == 20.0
    assert cluster.reason() == "FailedMount"
