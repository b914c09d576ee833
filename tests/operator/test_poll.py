"""Asking engines for their load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from pagoda_operator import poll
from pagoda_operator.names import Key
from pagoda_operator.poll import Poller, parse_load, ready_addresses
from pagoda_operator.scaling import PodLoad
from pagoda_operator.telemetry import Telemetry
from pagoda_operator.testing import KEY, make_pod, make_service

SCALED = {
    "engine": {"maxNumSeqs": 16},
    "autoscaling": {"maxReplicas": 3, "scaleDown": {"stabilizationSeconds": 0}},
}


@pytest.fixture
async def engine(unused_tcp_port: int) -> AsyncIterator[tuple[int, dict[str, int]]]:
    """A port on which `/load` answers with the dictionary that goes with it."""
    load = {"running": 0, "waiting": 0}

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(load)

    app = web.Application()
    app.router.add_get("/load", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    yield unused_tcp_port, load
    await runner.cleanup()


async def test_load_of_the_pods_moves_the_target_up_and_down(
    engine: tuple[int, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll, "BUSY_SECONDS", 0.01)
    port, load = engine
    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = Poller(
        clock=asyncio.get_running_loop().time,
        on_change=changes.put_nowait,
        telemetry=Telemetry(),
        port=port,
    )
    service = make_service(SCALED)
    try:
        target = poller.target(service, {}, None)
        poller.watch(service, target, [make_pod("rev", ready=True, ip="127.0.0.1")])
        load.update(running=16, waiting=24)
        assert await asyncio.wait_for(changes.get(), 5) == KEY
        assert poller.target(service, {}, None) == 2
        load.update(running=0, waiting=0)
        assert await asyncio.wait_for(changes.get(), 5) == KEY
        assert poller.target(service, {}, None) == 1
    finally:
        await poller.close()


async def test_a_service_with_a_fixed_number_of_replicas_is_not_asked() -> None:
    poller = Poller(
        clock=asyncio.get_running_loop().time, on_change=lambda key: None, telemetry=Telemetry()
    )
    before = len(asyncio.all_tasks())
    poller.watch(make_service({"autoscaling": {"minReplicas": 2, "maxReplicas": 2}}), 2, [])
    assert len(asyncio.all_tasks()) == before
    await poller.close()


async def test_a_pod_that_nobody_listens_on_has_no_load(unused_tcp_port: int) -> None:
    poller = Poller(
        clock=asyncio.get_running_loop().time,
        on_change=lambda key: None,
        telemetry=Telemetry(),
        port=unused_tcp_port,
    )
    assert await poller._ask("127.0.0.1") is None
    await poller.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"running": 1}',
        b'{"running": -1, "waiting": 0}',
        b'{"running": 1.5, "waiting": 0}',
        b'{"running": true, "waiting": 0}',
    ],
)
def test_what_is_not_an_engines_answer_is_no_load(body: bytes) -> None:
    assert parse_load(body) is None


def test_the_answer_of_an_engine_is_its_load() -> None:
    assert parse_load(b'{"running": 3, "waiting": 4, "slots": 16}') == PodLoad(3, 4)


def test_only_ready_pods_that_stay_are_asked() -> None:
    leaving = make_pod("rev", ready=True, ip="10.0.0.4")
    leaving["metadata"]["deletionTimestamp"] = "now"
    pods = [
        make_pod("rev", ready=True, ip="10.0.0.2"),
        make_pod("rev", ready=True, ip="fd00::1"),
        make_pod("rev", ip="10.0.0.3"),
        leaving,
    ]
    assert ready_addresses(pods) == ("10.0.0.2", "[fd00::1]")
