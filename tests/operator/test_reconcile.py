"""Whole passes of the reconciler over an API server in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pagoda_operator.cluster import Refused, Unavailable
from pagoda_operator.names import LABEL_REVISION, MANAGER, Key, Manifest
from pagoda_operator.poll import Poller
from pagoda_operator.reconcile import FIRST_STATUS_SECONDS, Reconciler
from pagoda_operator.render import revision_of
from pagoda_operator.testing import (
    KEY,
    MemoryCluster,
    make_manifest,
    make_pod,
    make_poller,
    set_deployment_status,
)

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def make_reconciler(cluster: MemoryCluster, poller: Poller) -> Reconciler:
    return Reconciler(cluster, poller, engine_image="engine:1", now=lambda: NOW)


@pytest.fixture
def reconciler(cluster: MemoryCluster, poller: Poller) -> Reconciler:
    return make_reconciler(cluster, poller)


async def settle(reconciler: Reconciler) -> None:
    """The first pass makes the children, the second one writes the status."""
    await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)


def replicas(cluster: MemoryCluster) -> int:
    return int(cluster.find("Deployment", "chat-engine")["spec"]["replicas"])


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("NetworkPolicy", {"networkPolicy": {"enabled": True}}),
        ("PodDisruptionBudget", {"replicas": 2}),
    ],
)
async def test_a_child_goes_when_the_spec_no_longer_asks_for_it(
    cluster: MemoryCluster, reconciler: Reconciler, kind: str, spec: Manifest
) -> None:
    cluster.put(make_manifest(spec))
    await settle(reconciler)
    assert (kind, "chat-engine") in cluster.objects
    cluster.edit({}, generation=2)
    await settle(reconciler)
    assert (kind, "chat-engine") not in cluster.objects


async def test_a_new_service_gets_its_children_and_then_nothing_is_written(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest())
    assert await reconciler.reconcile(KEY) == FIRST_STATUS_SECONDS
    assert await reconciler.reconcile(KEY) is None
    assert cluster.writes == [
        ("apply", "ServiceAccount", "chat-engine"),
        ("apply", "Service", "chat"),
        ("apply", "Deployment", "chat-engine"),
        ("status", "LLMService", "chat"),
    ]
    await reconciler.reconcile(KEY)
    assert len(cluster.writes) == 4


async def test_a_service_becomes_ready_when_its_deployment_does(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest())
    await settle(reconciler)
    assert cluster.reason() == "Progressing"
    set_deployment_status(cluster.find("Deployment", "chat-engine"), ready=1, updated=1, total=1)
    await reconciler.reconcile(KEY)
    assert cluster.reason() == "Serving"


async def test_a_rollout_without_room_is_looked_at_again_and_then_goes_in_place(
    cluster: MemoryCluster, poller: Poller
) -> None:
    now = NOW
    reconciler = Reconciler(cluster, poller, engine_image="engine:1", now=lambda: now)
    cluster.put(make_manifest())
    await settle(reconciler)
    live = cluster.find("Deployment", "chat-engine")
    set_deployment_status(live, ready=1, updated=1, total=2)
    for name, revision in (("old", "older"), ("new", revision_of(live))):
        pod = make_pod(
            revision, name=name, ready=name == "old", unschedulable="Insufficient nvidia.com/gpu"
        )
        pod["metadata"] |= {"namespace": "team", "creationTimestamp": NOW.isoformat()}
        pod["metadata"]["labels"]["pod-template-hash"] = name
        pod["spec"] = {"containers": [], **({"nodeName": "a"} if name == "old" else {})}
        cluster.put(pod)
    assert await reconciler.reconcile(KEY) == 120
    assert cluster.reason() == "NoRoomToSurge"
    now += timedelta(seconds=120)
    await reconciler.reconcile(KEY)
    told = cluster.find("LLMService", "chat")["status"]["rollout"]
    assert (told["strategy"], told["reason"]) == ("InPlace", "NoRoom")
    rolling = cluster.find("Deployment", "chat-engine")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.parametrize("writes_before_the_kill", [0, 1, 2, 3])
async def test_an_operator_killed_after_any_write_converges(
    cluster: MemoryCluster, poller: Poller, writes_before_the_kill: int
) -> None:
    class Killed(Exception):
        pass

    class DyingCluster(MemoryCluster):
        async def apply(self, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
            if len(self.writes) == writes_before_the_kill:
                raise Killed
            return await super().apply(manifest, manager=manager, force=force)

        async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
            if len(self.writes) == writes_before_the_kill:
                raise Killed
            return await super().apply_status(manifest, manager=manager)

    dying = DyingCluster()
    dying.put(make_manifest())
    with pytest.raises(Killed):
        await settle(make_reconciler(dying, poller))
    cluster.objects = dying.objects
    restarted = make_reconciler(cluster, poller)
    await settle(restarted)
    assert sorted(cluster.objects) == [
        ("Deployment", "chat-engine"),
        ("LLMService", "chat"),
        ("Service", "chat"),
        ("ServiceAccount", "chat-engine"),
    ]
    assert cluster.reason() == "Progressing"
    before = len(cluster.writes)
    await restarted.reconcile(KEY)
    assert len(cluster.writes) == before


async def test_a_deleted_child_comes_back(cluster: MemoryCluster, reconciler: Reconciler) -> None:
    cluster.put(make_manifest())
    await settle(reconciler)
    del cluster.objects["Service", "chat"]
    await reconciler.reconcile(KEY)
    assert cluster.writes[-1] == ("apply", "Service", "chat")


async def test_replicas_follow_the_spec_and_edits_by_hand_do_not_last(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest({"replicas": 2}))
    await settle(reconciler)
    assert replicas(cluster) == 2
    cluster.find("Deployment", "chat-engine")["spec"]["replicas"] = 7
    await reconciler.reconcile(KEY)
    assert replicas(cluster) == 2
    cluster.edit({"replicas": 3}, 2)
    await reconciler.reconcile(KEY)
    assert replicas(cluster) == 3
    cluster.edit({"replicas": 3, "suspend": True}, 3)
    await reconciler.reconcile(KEY)
    assert replicas(cluster) == 0


async def test_an_edit_of_the_engine_keeps_the_replicas_that_scaling_set(
    cluster: MemoryCluster, poller: Poller
) -> None:
    scaled = {"autoscaling": {"maxReplicas": 5}}
    cluster.put(make_manifest(scaled))
    await settle(make_reconciler(cluster, poller))
    cluster.find("LLMService", "chat")["status"]["desiredReplicas"] = 4
    restarted_poller = make_poller()
    restarted = make_reconciler(cluster, restarted_poller)
    await restarted.reconcile(KEY)
    assert replicas(cluster) == 4
    cluster.edit({**scaled, "engine": {"maxNumSeqs": 8}}, 2)
    await restarted.reconcile(KEY)
    assert replicas(cluster) == 4
    await restarted_poller.close()


async def test_last_words_stall_the_service_and_a_corrected_spec_recovers(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest())
    await settle(reconciler)
    revision = revision_of(cluster.find("Deployment", "chat-engine"))
    words = '{"reason": "ModelNotFound", "message": "/models/gemma is not there"}'
    failed = {"state": {"terminated": {"exitCode": 1, "message": words}}}
    cluster.put(make_pod(revision, container=failed))
    await reconciler.reconcile(KEY)
    assert cluster.reason("Stalled") == "ModelNotFound"
    cluster.edit({"model": {"uri": "pvc://models/right"}}, 2)
    await reconciler.reconcile(KEY)
    assert cluster.reason("Ready") == "Progressing"
    deployment = cluster.find("Deployment", "chat-engine")
    assert deployment["spec"]["template"]["metadata"]["labels"][LABEL_REVISION] != revision


async def test_a_name_that_a_stranger_holds_stalls_and_is_looked_at_again(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest())
    cluster.put({"kind": "Service", "metadata": {"name": "chat"}, "spec": {"mine": True}})
    assert await reconciler.reconcile(KEY) is not None
    assert cluster.reason("Stalled") == "NameConflict"
    assert cluster.find("Service", "chat")["spec"] == {"mine": True}
    del cluster.objects["Service", "chat"]
    await settle(reconciler)
    assert cluster.reason() == "Progressing"


async def test_a_refusal_of_the_api_server_is_shown_in_its_words(
    poller: Poller,
) -> None:
    class FullCluster(MemoryCluster):
        async def apply(self, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
            raise Refused("exceeded quota: team")

    cluster = FullCluster()
    cluster.put(make_manifest())
    pause = await make_reconciler(cluster, poller).reconcile(KEY)
    # Whatever ended it, the service has half a minute to converge.
    assert pause is not None
    assert pause <= 15
    assert cluster.reason("Stalled") == "QuotaExceeded"


async def test_an_outage_is_left_to_the_queue(poller: Poller) -> None:
    class DeadCluster(MemoryCluster):
        async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
            raise Unavailable("no answer")

    with pytest.raises(Unavailable):
        await make_reconciler(DeadCluster(), poller).reconcile(KEY)


async def test_a_spec_of_a_newer_crd_is_named_and_nothing_is_done(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest({"router": {}}))
    await reconciler.reconcile(KEY)
    assert cluster.reason("Stalled") == "InvalidSpec"
    assert cluster.writes == [("status", "LLMService", "chat")]


async def test_a_deleted_service_is_left_to_the_garbage_collector(
    cluster: MemoryCluster, reconciler: Reconciler
) -> None:
    assert await reconciler.reconcile(Key("team", "gone")) is None
    manifest = make_manifest()
    manifest["metadata"]["deletionTimestamp"] = "now"
    cluster.put(manifest)
    await reconciler.reconcile(KEY)
    assert cluster.writes == []


async def test_a_leftover_of_an_earlier_operator_is_deleted_after_a_restart(
    cluster: MemoryCluster, poller: Poller, reconciler: Reconciler
) -> None:
    cluster.put(make_manifest())
    await settle(reconciler)
    leftover = dict(cluster.find("Service", "chat"))
    leftover["metadata"] = {**leftover["metadata"], "name": "chat-old", "uid": "uid-old"}
    cluster.put(leftover)
    await make_reconciler(cluster, poller).reconcile(KEY)
    assert ("delete", "Service", "chat-old") in cluster.writes
    assert ("Service", "chat-old") not in cluster.objects


async def test_children_that_a_deletion_leaves_behind_while_a_pass_looks_stay_without_owner(
    cluster: MemoryCluster, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kubectl delete --cascade=orphan`: a name given back would let them go with the service."""
    cluster.put(make_manifest())
    await settle(make_reconciler(cluster, poller))
    list_children = cluster.list

    async def list_after_deletion(kind: str, *arguments: str | None) -> list[Manifest]:
        cluster.find("LLMService", "chat")["metadata"]["deletionTimestamp"] = "now"
        for manifest in cluster.objects.values():
            manifest["metadata"].pop("ownerReferences", None)
            manifest["metadata"]["managedFields"] = [{"manager": MANAGER, "operation": "Apply"}]
        return await list_children(kind, *arguments)

    monkeypatch.setattr(cluster, "list", list_after_deletion)
    cluster.writes.clear()
    assert await make_reconciler(cluster, poller).reconcile(KEY) is None
    assert cluster.writes == []


@pytest.mark.parametrize("is_made_anew", [False, True])
async def test_children_that_go_with_their_service_while_a_pass_looks_are_not_made_again(
    cluster: MemoryCluster,
    reconciler: Reconciler,
    monkeypatch: pytest.MonkeyPatch,
    is_made_anew: bool,
) -> None:
    cluster.put(make_manifest())
    await settle(reconciler)
    get = cluster.get

    async def get_after_deletion(kind: str, namespace: str, name: str) -> Manifest | None:
        found = await get(kind, namespace, name)
        if kind == "LLMService":
            cluster.objects.clear()
            if is_made_anew:
                cluster.put(make_manifest())
                cluster.find("LLMService", "chat")["metadata"]["uid"] = "another"
        return found

    monkeypatch.setattr(cluster, "get", get_after_deletion)
    cluster.writes.clear()
    assert (await reconciler.reconcile(KEY) is not None) == is_made_anew
    assert cluster.writes == []
