"""Passes of a service whose children somebody else changes again and again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pagoda_operator.poll import Poller
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.testing import KEY, MemoryCluster, make_manifest

NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def settled(cluster: MemoryCluster, poller: Poller) -> tuple[Reconciler, Clock]:
    """A service that has its children, and a clock that stands."""
    clock = Clock()
    reconciler = Reconciler(cluster, poller, engine_image="engine:1", now=lambda: NOW, clock=clock)
    cluster.put(make_manifest())
    await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)
    return reconciler, clock


@pytest.mark.parametrize("field", ["revisionHistoryLimit", "replicas"])
async def test_a_field_that_is_set_again_and_again_is_put_back_later_and_later(
    cluster: MemoryCluster, settled: tuple[Reconciler, Clock], field: str
) -> None:
    reconciler, clock = settled
    before = len(cluster.writes)
    for _ in range(600):
        deployment = cluster.find("Deployment", "chat-engine")
        deployment["spec"][field] = 5
        await reconciler.reconcile(KEY)
        clock.now += 0.1
    corrections = [write for write in cluster.writes[before:] if write[0] == "apply"]
    # After 0, 1, 3, 7, 15 and 31 of 60 seconds.
    assert len(corrections) == 6
    assert cluster.reason("Stalled") == "Contested"


async def test_a_child_that_is_deleted_again_and_again_comes_back_later_and_later(
    cluster: MemoryCluster, settled: tuple[Reconciler, Clock]
) -> None:
    reconciler, clock = settled
    before = len(cluster.writes)
    for _ in range(60):
        cluster.objects.pop(("Service", "chat"), None)
        await reconciler.reconcile(KEY)
        clock.now += 0.5
    made = [write for write in cluster.writes[before:] if write[0] == "apply"]
    # After 0, 1, 3, 7 and 15 of 30 seconds.
    assert made == [("apply", "Service", "chat")] * 5
    assert cluster.reason("Stalled") == "Contested"


async def test_a_fight_that_is_over_is_no_more_said(
    cluster: MemoryCluster, settled: tuple[Reconciler, Clock]
) -> None:
    reconciler, clock = settled
    for _ in range(3):
        cluster.find("Deployment", "chat-engine")["spec"]["replicas"] = 5
        again = await reconciler.reconcile(KEY)
        clock.now += 10
    assert cluster.reason("Stalled") == "Contested"
    assert again is not None
    clock.now += again
    assert await reconciler.reconcile(KEY) is None
    assert cluster.reason() == "Progressing"


async def test_a_changed_spec_is_applied_in_the_middle_of_a_fight(
    cluster: MemoryCluster, settled: tuple[Reconciler, Clock]
) -> None:
    reconciler, _ = settled
    for _ in range(3):
        cluster.find("Deployment", "chat-engine")["spec"]["revisionHistoryLimit"] = 5
        again = await reconciler.reconcile(KEY)
    assert again == 1.0
    before = len(cluster.writes)
    cluster.edit({"engine": {"maxNumSeqs": 9}}, 2)
    await reconciler.reconcile(KEY)
    assert ("apply", "Deployment", "chat-engine") in cluster.writes[before:]
