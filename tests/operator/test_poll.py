"""Asking engines for their load."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from pagoda_operator import engines, poll
from pagoda_operator.names import Key
from pagoda_operator.poll import Poller, parse_load, pause_seconds, ready_addresses
from pagoda_operator.scaling import PodLoad, ScalingState
from pagoda_operator.telemetry import Telemetry
from pagoda_operator.testing import KEY, make_pod, make_service

SCALED = {
    "engine": {"maxNumSeqs": 16},
    "autoscaling": {"maxReplicas": 3, "scaleDown": {"stabilizationSeconds": 0}},
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds without a pause."""
    monkeypatch.setattr(poll, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(poll, "TICK_SECONDS", 0.01)


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
    engine: tuple[int, dict[str, int]], quick: None
) -> None:
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


def make_poller(port: int, changes: asyncio.Queue[Key] | None = None) -> Poller:
    return Poller(
        clock=asyncio.get_running_loop().time,
        on_change=lambda key: None if changes is None else changes.put_nowait(key),
        telemetry=Telemetry(),
        port=port,
    )


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(port: int, load: Handler, path: str = "/load") -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get(path, load)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def failures(poller: Poller, reason: str) -> float:
    labels = {"reason": reason}
    found = poller.telemetry.registry.get_sample_value(
        "pagoda_operator_poll_failures_total", labels
    )
    return found or 0.0


async def blindness_after(
    poller: Poller, changes: asyncio.Queue[Key], addresses: tuple[str, ...] = ("127.0.0.1",)
) -> str | None:
    """What is said of the service once there is news."""
    pods = [make_pod("rev", name=ip, ready=True, ip=ip) for ip in addresses]
    poller.watch(make_service(SCALED), 1, pods)
    await asyncio.wait_for(changes.get(), 5)
    return poller.blindness(KEY)


async def test_a_pod_that_nobody_listens_on_makes_scaling_blind_until_it_answers(
    unused_tcp_port: int, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(unused_tcp_port, changes)
    assert await blindness_after(poller, changes) == (
        "no ready replica tells its load at /load (no connection)"
    )
    assert failures(poller, "unreachable") >= poll.NEWS_AFTER_ROUNDS
    assert len([line for line in caplog.messages if "scaling is blind" in line]) == 1

    async def idle(_: web.Request) -> web.Response:
        return web.json_response({"running": 0, "waiting": 0})

    async with serving(unused_tcp_port, idle):
        await asyncio.wait_for(changes.get(), 5)
        assert poller.blindness(KEY) is None
    await poller.close()


async def test_one_silent_pod_of_two_is_told_apart_from_all(
    engine: tuple[int, dict[str, int]], quick: None
) -> None:
    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(engine[0], changes)
    said = await blindness_after(poller, changes, ("127.0.0.1", "127.0.0.2"))
    assert said == "not every ready replica tells its load at /load (no connection)"
    await poller.close()


async def test_no_redirect_of_a_pod_is_followed(unused_tcp_port: int, quick: None) -> None:
    asked = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/load":
            raise web.HTTPFound("/secret")
        return web.json_response({"running": 9, "waiting": 999})

    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(unused_tcp_port, changes)
    async with serving(unused_tcp_port, redirect, "/{path}"):
        said = await blindness_after(poller, changes)
    assert said == "no ready replica tells its load at /load (an HTTP status other than 200)"
    assert set(asked) == {"/load"}
    await poller.close()


async def test_a_pod_that_is_silent_for_one_reason_and_another_is_news_once(
    unused_tcp_port: int, quick: None
) -> None:
    asked = 0

    async def three_of_four_fail(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked % 4 == 0:
            return web.json_response({"running": 1, "waiting": 0})
        return web.Response(status=503) if asked % 2 else web.Response(body=b"[]")

    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(unused_tcp_port, changes)
    async with serving(unused_tcp_port, three_of_four_fail):
        poller.watch(make_service(SCALED), 1, [make_pod("rev", ready=True, ip="127.0.0.1")])
        while asked < 40:
            await asyncio.sleep(0.01)
    assert changes.qsize() == 1
    await poller.close()


async def test_an_answer_that_nests_too_deep_ends_nothing(
    unused_tcp_port: int, quick: None
) -> None:
    bodies = [b"[" * 15000] * 4

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=bodies.pop() if bodies else b'{"running": 16, "waiting": 24}')

    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(unused_tcp_port, changes)
    async with serving(unused_tcp_port, answer):
        said = await blindness_after(poller, changes)
        assert said == "no ready replica tells its load at /load (not the answer of an engine)"
        while poller.target(make_service(SCALED), {}, None) == 1:
            await asyncio.wait_for(changes.get(), 5)
    await poller.close()


async def test_a_bug_of_ours_is_counted_and_the_pods_are_asked_again(
    engine: tuple[int, dict[str, int]],
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, load = engine
    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(port, changes)
    right, rounds = poll.decide, iter(range(2))

    def wrong_twice(*arguments: Any) -> ScalingState:
        if next(rounds, None) is not None:
            raise ZeroDivisionError
        return right(*arguments)

    monkeypatch.setattr(poll, "decide", wrong_twice)
    load.update(running=16, waiting=24)
    poller.watch(make_service(SCALED), 1, [make_pod("rev", ready=True, ip="127.0.0.1")])
    assert await asyncio.wait_for(changes.get(), 5) == KEY
    assert failures(poller, "error") == 2
    assert "ZeroDivisionError" in caplog.text
    await poller.close()


async def test_silent_pods_of_one_service_do_not_keep_another_waiting(
    unused_tcp_port: int, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every address of 127.0.0.0/8 is this machine: 150 pods never answer, and one does."""
    monkeypatch.setattr(engines, "ANSWER_SECONDS", 60.0)
    num_silent = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal num_silent
        if request.url.host != "127.0.1.1":
            num_silent += 1
            await asyncio.sleep(60)
        return web.json_response({"running": 16, "waiting": 24})

    changes: asyncio.Queue[Key] = asyncio.Queue()
    poller = make_poller(unused_tcp_port, changes)
    silent = [make_pod("r", name=str(i), ready=True, ip=f"127.0.0.{i}") for i in range(1, 151)]
    async with serving(unused_tcp_port, answer):
        poller.watch(make_service(SCALED), 1, silent)
        while num_silent < poll.MAX_ASKED_AT_ONCE:
            await asyncio.sleep(0.01)
        other = dataclasses.replace(make_service(SCALED), key=Key("team", "other"))
        poller.watch(other, 1, [make_pod("r", ready=True, ip="127.0.1.1")])
        assert (await asyncio.wait_for(changes.get(), 30)).name == "other"
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
        b"[" * 15000,
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


@pytest.mark.parametrize(
    ("now", "interval", "expected"), [(10.0, 2.0, 12.0), (10.01, 2.0, 12.0), (9.9, 3.125, 13.0)]
)
def test_services_are_asked_at_the_same_times(now: float, interval: float, expected: float) -> None:
    assert now + pause_seconds(now, interval) == expected
