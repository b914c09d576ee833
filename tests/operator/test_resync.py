"""What no watch told is found by lists, and a watch that stands still is named."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pagoda_operator import resync as module
from pagoda_operator.cluster import Unavailable
from pagoda_operator.names import KIND, LABEL_SERVICE, Key, Manifest
from pagoda_operator.resync import Resync, owners
from pagoda_operator.telemetry import Telemetry
from pagoda_operator.testing import make_pod

CHAT = Key("team", "chat")


class World:
    """Objects as lists have them, a clock, and the keys that were enqueued."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Manifest]] = {}
        self.during_list: Callable[[], None] = lambda: None
        self.trouble: Exception | None = None
        self.now = 100.0
        self.enqueued: list[Key] = []
        self.forgotten: list[Key] = []
        self.telemetry = Telemetry()
        self.resync = Resync(
            self,  # type: ignore[arg-type]  # all that it asks of an API server
            self.telemetry,
            self.enqueued.append,
            forget=self.forgotten.append,
            namespace=None,
            clock=lambda: self.now,
        )

    async def list_metadata(self, kind: str, namespace: str | None, selector: str) -> Any:
        assert selector == module.selector_of(kind)
        if self.trouble is not None:
            raise self.trouble
        if kind == "Deployment":
            self.during_list()
        return self.objects.get(kind, [])

    def drift(self, kind: str) -> float:
        name = "pagoda_operator_resync_drift_total"
        return self.telemetry.registry.get_sample_value(name, {"kind": kind}) or 0.0

    def age(self, kind: str) -> float:
        name = "pagoda_operator_watch_age_seconds"
        return self.telemetry.registry.get_sample_value(name, {"kind": kind}) or 0.0


def metadata(version: int, uid: str = "uid-1") -> Manifest:
    labels = {LABEL_SERVICE: "chat"}
    place = {"namespace": "team", "name": "chat-engine", "labels": labels}
    return {"uid": uid, "resourceVersion": str(version), **place}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    return World()


def tell(world: World, version: int, *, is_gone: bool = False) -> None:
    assert world.resync.note("Deployment", metadata(version), is_gone=is_gone) == (CHAT,)


async def test_what_the_watches_told_costs_no_pass(world: World) -> None:
    tell(world, 1)
    world.objects["Deployment"] = [metadata(1)]
    world.objects[KIND] = [{**metadata(1), "name": "chat"}]
    world.resync.note(KIND, world.objects[KIND][0], is_gone=False)
    assert await world.resync.look(()) == [CHAT]
    assert world.enqueued == []
    assert world.drift("Deployment") == 0


@pytest.mark.parametrize("told", [None, 1])
async def test_a_version_that_no_watch_tells_is_found_and_the_watch_is_behind(
    world: World, told: int | None
) -> None:
    if told is not None:
        tell(world, told)
    world.objects["Deployment"] = [metadata(2)]
    await world.resync.look(())
    assert world.enqueued == [CHAT]
    assert world.drift("Deployment") == 1
    assert world.resync.find_dead() is None
    world.now += module.DEAD_SECONDS
    await world.resync.look(())
    assert world.resync.find_dead() == "Deployment"
    assert world.age("Deployment") == module.DEAD_SECONDS
    tell(world, 2)
    await world.resync.look(())
    assert world.resync.find_dead() is None
    assert world.age("Deployment") == 0


async def test_a_deletion_that_was_missed_is_found_once_and_no_watch_is_behind(
    world: World,
) -> None:
    tell(world, 1)
    await world.resync.look(())
    assert world.enqueued == [CHAT]
    world.now += module.DEAD_SECONDS
    await world.resync.look(())
    assert world.enqueued == [CHAT]
    assert world.resync.find_dead() is None
    assert world.drift("Deployment") == 1


def note(world: World, found: Manifest) -> None:
    world.resync.note("Deployment", found, is_gone=False)


async def during_the_list_the_watch_goes_on(world: World) -> None:
    tell(world, 1)
    world.objects["Deployment"] = [metadata(2)]
    world.during_list = lambda: tell(world, 3)


async def during_the_list_it_is_made(world: World) -> None:
    world.during_list = lambda: tell(world, 1)


async def during_the_list_it_goes(world: World) -> None:
    tell(world, 1)
    world.objects["Deployment"] = [metadata(1)]
    world.during_list = lambda: tell(world, 1, is_gone=True)


@pytest.mark.parametrize(
    "change",
    [
        during_the_list_the_watch_goes_on,
        during_the_list_it_is_made,
        during_the_list_it_goes,
    ],
)
async def test_what_is_told_while_a_list_is_made_was_not_missed(
    world: World, change: Callable[[World], Awaitable[None]]
) -> None:
    await change(world)
    await world.resync.look(())
    assert world.enqueued == []
    assert world.drift("Deployment") == 0


async def test_while_a_watch_tells_of_others_a_version_it_did_not_tell_costs_a_pass_alone(
    world: World,
) -> None:
    """A process that is busy is behind with its events, and the watch lives."""
    tell(world, 1)
    world.objects["Deployment"] = [metadata(2), metadata(1, "uid-2")]
    for version in (1, 2):
        world.during_list = lambda version=version: note(world, metadata(version, "uid-2"))
        world.objects["Deployment"][1] = metadata(version, "uid-2")
        await world.resync.look(())
        world.now += module.DEAD_SECONDS
    assert world.enqueued == [CHAT, CHAT]
    assert world.drift("Deployment") == 0
    assert world.resync.find_dead() is None


async def test_an_object_made_anew_before_its_deletion_is_told_stays_known(world: World) -> None:
    tell(world, 1)
    world.resync.note("Deployment", metadata(3, "uid-2"), is_gone=False)
    tell(world, 2, is_gone=True)
    world.objects["Deployment"] = [metadata(3, "uid-2")]
    await world.resync.look(())
    assert world.enqueued == []


async def test_an_outage_says_nothing_of_the_watches(world: World) -> None:
    world.objects["Deployment"] = [metadata(2)]
    await world.resync.look(())
    world.trouble = Unavailable("no answer")
    world.now += module.DEAD_SECONDS
    with pytest.raises(Unavailable):
        await world.resync.look(())
    world.trouble = None
    await world.resync.look(())
    assert world.resync.find_dead() is None


async def test_a_kind_that_nobody_watches_is_no_drift(world: World) -> None:
    world.objects["PodMonitor"] = [metadata(1)]
    for version, num_enqueued in ((1, 1), (1, 1), (2, 2)):
        world.objects["PodMonitor"] = [metadata(version)]
        await world.resync.look(("PodMonitor",))
        assert len(world.enqueued) == num_enqueued
    assert world.drift("PodMonitor") == 0


def test_an_object_leads_to_its_owner_and_to_what_its_label_says() -> None:
    assert owners(make_pod("rev")["metadata"]) == {"chat"}
    owner = {"kind": "LLMService", "name": "chat"}
    edited = {"ownerReferences": [owner], "labels": {"pagoda.dev/service": "another"}}
    assert owners(edited) == {"chat", "another"}
    assert owners({"ownerReferences": [{"kind": "ReplicaSet", "name": "x"}]}) == set()


async def test_the_version_that_a_watch_told_is_doubted_until_it_tells_again(
    world: World,
) -> None:
    assert world.resync.told("Deployment", "uid-1") is None
    tell(world, 1)
    assert world.resync.told("Deployment", "uid-1") == "1"
    world.objects["Deployment"] = [metadata(2)]
    await world.resync.look(())
    assert world.resync.told("Deployment", "uid-1") is None
    tell(world, 2)
    assert world.resync.told("Deployment", "uid-1") == "2"
    tell(world, 2, is_gone=True)
    assert world.resync.told("Deployment", "uid-1") is None


async def test_a_doubt_ends_with_the_next_look_that_finds_what_was_told(world: World) -> None:
    tell(world, 1)
    world.objects["Deployment"] = [metadata(2)]
    await world.resync.look(())
    world.objects["Deployment"] = [metadata(1)]
    await world.resync.look(())
    assert world.resync.told("Deployment", "uid-1") == "1"


async def test_a_kind_that_nobody_watches_is_never_told(world: World) -> None:
    world.objects["PodMonitor"] = [metadata(1)]
    await world.resync.look(("PodMonitor",))
    assert world.resync.told("PodMonitor", "uid-1") is None


async def test_what_no_watch_told_makes_its_service_forgotten(world: World) -> None:
    tell(world, 1)
    world.objects["Deployment"] = [metadata(2)]
    await world.resync.look(())
    assert world.forgotten == world.enqueued == [CHAT]


async def test_what_nobody_watches_makes_nothing_forgotten(world: World) -> None:
    world.objects["PodMonitor"] = [metadata(1)]
    await world.resync.look(("PodMonitor",))
    assert world.enqueued == [CHAT]
    assert not world.forgotten
