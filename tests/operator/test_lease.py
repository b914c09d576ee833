"""Who serves a namespace."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import subprocess

import pytest

from pagoda_operator import lease as module
from pagoda_operator.cluster import Conflict, Refused, Unavailable
from pagoda_operator.lease import Lease, Sightings, is_dead_here, own_identity
from pagoda_operator.names import Manifest


class Api:
    """Leases in memory, with the API server's rules on who was faster."""

    def __init__(self) -> None:
        self.leases: dict[tuple[str, str], Manifest] = {}
        self.trouble: Exception | None = None
        self._version = 0

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        if self.trouble:
            raise self.trouble
        return copy.deepcopy(self.leases.get((namespace, name)))

    async def write(self, manifest: Manifest) -> Manifest:
        if self.trouble:
            raise self.trouble
        version = manifest["metadata"].get("resourceVersion")
        place = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if self.leases.get(place, {"metadata": {}})["metadata"].get("resourceVersion") != version:
            raise Conflict("another one was faster")
        self._version += 1
        stored = copy.deepcopy(manifest)
        stored["metadata"]["resourceVersion"] = str(self._version)
        self.leases[place] = stored
        return copy.deepcopy(stored)

    def holder(self, namespace: str = "team", name: str = "pagoda-operator") -> str | None:
        found: str | None = self.leases[namespace, name]["spec"]["holderIdentity"]
        return found


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.001)


async def turns(number: int = 50) -> None:
    for _ in range(number):
        await asyncio.sleep(0.001)


async def test_a_free_namespace_is_taken_at_once() -> None:
    api = Api()
    mine = Lease(api, "team", Clock(), "first_x")
    assert not mine.is_held
    await mine.acquire()
    assert mine.is_held
    assert api.holder() == "first_x"


async def test_a_second_operator_stands_by_until_the_first_lets_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api, clock = Api(), Clock()
    first, second = Lease(api, "team", clock, "first_x"), Lease(api, "team", clock, "second_x")
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await turns()
    assert not second.is_held
    assert second.describe_holder() == (
        "the operator first_x serves the namespace team (Lease team/pagoda-operator); "
        "uninstall one of the two"
    )
    assert len([line for line in caplog.messages if "standing by" in line]) == 1
    await first.release()
    await asyncio.wait_for(waiting, 5)
    assert (second.is_held, api.holder()) == (True, "second_x")


@pytest.mark.parametrize(
    ("installation", "is_reserve"), [("ns/pagoda", True), ("ns/second", False), (None, False)]
)
async def test_a_replica_of_the_same_installation_is_no_rival(
    installation: str | None, is_reserve: bool
) -> None:
    api, clock = Api(), Clock()
    await Lease(api, "team", clock, "first_x", replica_of="ns/pagoda").acquire()
    second = Lease(api, "team", clock, "second_x", replica_of=installation)
    waiting = asyncio.create_task(second.acquire())
    await turns()
    assert second.is_reserve is is_reserve
    remedy = "this replica stands by" if is_reserve else "uninstall one of the two"
    assert second.describe_holder().endswith(remedy)
    waiting.cancel()


async def test_a_lease_is_let_go_also_where_a_renewal_was_cut_off_before_its_answer() -> None:
    api = Api()
    mine = Lease(api, "team", Clock(), "first_x")
    await mine.acquire()
    (written,) = api.leases.values()
    await api.write(written)
    await mine.release()
    assert api.holder() is None


async def test_a_holder_that_renews_lives_and_a_silent_one_is_dead_after_its_duration() -> None:
    api, clock = Api(), Clock()
    first, second = Lease(api, "team", clock, "first_x"), Lease(api, "team", clock, "second_x")
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    renewing = asyncio.create_task(first.renew())
    for _ in range(5):
        clock.now += 10
        await turns(10)
    assert not second.is_held
    renewing.cancel()
    await turns(5)
    clock.now += 14
    await turns(10)
    assert not second.is_held
    clock.now += 1
    await asyncio.wait_for(waiting, 5)
    assert not first.is_held


async def test_an_operator_whose_lease_was_taken_is_told() -> None:
    api, clock = Api(), Clock()
    first, second = Lease(api, "team", clock, "first_x"), Lease(api, "team", clock, "second_x")
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await turns()
    clock.now += 15
    await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(first.renew(), 5)
    assert first.holder == "second_x"


async def test_an_outage_ends_nothing_and_the_lease_is_held_again_after_it() -> None:
    api, clock = Api(), Clock()
    times_regained: list[float] = []
    mine = Lease(
        api, "team", clock, "first_x", on_regained=lambda: times_regained.append(clock.now)
    )
    await mine.acquire()
    renewing = asyncio.create_task(mine.renew())
    await turns()
    api.trouble = Unavailable("no answer")
    clock.now += 60
    await turns()
    assert not mine.is_held
    assert not times_regained
    api.trouble = None
    await turns()
    assert mine.is_held
    assert times_regained == [clock.now]
    assert not renewing.done()
    renewing.cancel()


async def test_what_the_api_server_asks_to_wait_is_waited() -> None:
    api, clock = Api(), Clock()
    api.trouble = Unavailable("too many requests", 0.2)
    mine = Lease(api, "team", clock, "first_x")
    waiting = asyncio.create_task(mine.acquire())
    await turns(5)
    api.trouble = None
    await turns()
    assert not mine.is_held
    await asyncio.wait_for(waiting, 5)
    assert mine.is_held


async def test_without_the_right_to_leases_the_operator_works_and_says_what_is_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = Api()
    api.trouble = Refused("leases is forbidden")
    mine = Lease(api, "team", Clock(), "first_x")
    await mine.acquire()
    assert mine.is_held
    assert "a second operator would not be noticed: leases is forbidden" in caplog.text
    renewing = asyncio.create_task(mine.renew())
    await turns()
    assert mine.is_held
    api.trouble = None
    await turns()
    assert api.holder() == "first_x"
    api.trouble = Refused("leases is forbidden")
    await turns()
    assert mine.is_held
    renewing.cancel()


async def test_a_cluster_wide_operator_leaves_a_namespace_that_has_its_own_operator() -> None:
    api, clock = Api(), Clock()
    wide, narrow = Lease(api, None, clock, "wide_x"), Lease(api, "team", clock, "narrow_x")
    await wide.acquire()
    assert api.holder("default", "pagoda-operator-cluster") == "wide_x"
    assert await wide.other_holder("team") is None
    await narrow.acquire()
    assert await wide.other_holder("team") is None
    clock.now += module.FREE_SECONDS
    assert await wide.other_holder("team") == "narrow_x"
    assert await wide.other_holder("another") is None
    assert await narrow.other_holder("team") is None
    clock.now += module.BELIEVED_SECONDS
    await narrow.release()
    assert await wide.other_holder("team") is None


async def test_rights_to_the_own_lease_alone_keep_a_cluster_wide_operator_from_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = Api()
    wide = Lease(api, None, Clock(), "wide_x")
    await wide.acquire()
    api.trouble = Refused("may not get leases in team")
    assert await wide.other_holder("team") is None
    assert await wide.other_holder("another") is None
    assert caplog.text.count("operators of namespaces are not noticed: may not get leases") == 1


async def test_a_lease_that_was_left_behind_is_believed_for_one_duration() -> None:
    api, clock = Api(), Clock()
    await Lease(api, "team", clock, "gone_x").acquire()
    clock.now += 1000
    wide = Lease(api, None, clock, "wide_x")
    assert await wide.other_holder("team") == "gone_x"
    clock.now += module.DURATION_SECONDS
    assert await wide.other_holder("team") is None


def test_a_process_of_this_host_that_is_no_more_is_not_waited_for() -> None:
    ended = subprocess.Popen(["true"])
    pid = ended.pid
    ended.wait()
    assert is_dead_here(f"{socket.gethostname()}_{pid}")
    assert not is_dead_here(f"{socket.gethostname()}_{os.getppid()}")
    assert not is_dead_here(f"another-host_{pid}")
    # An earlier container of this pod, with the same number.
    assert is_dead_here(own_identity())


def test_a_lease_that_nobody_holds_has_no_holder() -> None:
    metadata = {"namespace": "team", "name": "x", "resourceVersion": "1"}
    assert Sightings().holder({"metadata": metadata}, 0.0) is None
    assert Sightings().holder(None, 0.0) is None
