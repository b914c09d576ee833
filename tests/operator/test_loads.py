"""How far engines are that start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from pagoda_operator.cause import Cause
from pagoda_operator.engines import Engines
from pagoda_operator.loads import Loads, parse_progress, with_progress
from pagoda_operator.names import Key, Manifest
from pagoda_operator.testing import KEY, make_pod

SAID = {"phase": "load", "percent": 43.7, "bytes_per_second": 1.5e9, "eta_seconds": 19.2}
LOAD = {
    "pod": "pod-1",
    "phase": "Load",
    "percent": 43,
    "bytesPerSecond": 1500000000,
    "etaSeconds": 20,
}
LOADING = Cause("LoadingModel", "The engine loads the model.", False)


@pytest.fixture
async def said(unused_tcp_port: int) -> AsyncIterator[dict[str, Any]]:
    """What an engine on 127.0.0.1 says."""
    found: dict[str, Any] = dict(SAID)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=503, text=json.dumps(found))

    app = web.Application()
    app.router.add_get("/startup", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    yield found
    await runner.cleanup()


async def test_a_starting_engine_is_asked_until_it_is_ready(
    said: dict[str, Any], unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_ASK_SECONDS", "ASK_SECONDS"):
        monkeypatch.setattr(f"pagoda_operator.loads.{name}", 0.01)
    changes = asyncio.Queue[Key]()
    engines = Engines(unused_tcp_port)
    loads = Loads(engines, changes.put_nowait)
    pod = make_pod("rev", ip="127.0.0.1")
    assert loads.find(KEY, [pod]) == []
    assert await asyncio.wait_for(changes.get(), 5) == KEY
    assert loads.find(KEY, [pod]) == [LOAD]
    # The same again is no news.
    await asyncio.sleep(0.1)
    assert changes.empty()
    said["percent"] = 60.0
    await asyncio.wait_for(changes.get(), 5)
    assert loads.find(KEY, [pod])[0]["percent"] == 60
    assert loads.find(KEY, [make_pod("rev", ip="127.0.0.1", ready=True)]) == []
    await loads.close()
    await engines.close()


def leaving() -> Manifest:
    pod = make_pod("rev", ip="127.0.0.1")
    pod["metadata"]["deletionTimestamp"] = "now"
    return pod


@pytest.mark.parametrize(
    "pod",
    [
        leaving(),
        make_pod("rev", ip=""),
        make_pod("rev", container={"started": True}),
        make_pod("rev", container={"state": {"waiting": {}}}),
        make_pod("rev", container={"name": "sidecar"}),
        make_pod("rev", unschedulable="no room"),
    ],
)
async def test_other_pods_are_not_asked(pod: Manifest) -> None:
    loads = Loads(Engines(1), lambda _: None)
    assert loads.find(KEY, [pod]) == []
    assert not loads._asked


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "ready"},
        {"phase": "two words"},
        {"phase": None},
        {"percent": 101},
        {"percent": "43"},
        {"percent": float("nan")},
        {"bytes_per_second": -1},
        {"bytes_per_second": True},
    ],
)
def test_what_is_no_progress_is_not_told(change: dict[str, Any]) -> None:
    assert parse_progress("pod-1", json.dumps({**SAID, **change}).encode()) is None


def test_a_pace_that_is_not_known_is_left_out() -> None:
    for left in (None, "soon", float("inf"), 1e300):
        said = {**SAID, "eta_seconds": left, "bytes_per_second": 0}
        load = parse_progress("pod-1", json.dumps(said).encode())
        assert load == {"pod": "pod-1", "phase": "Load", "percent": 43}
    for body in (b"", b"[]", b"{}", b"[" * 15000):
        assert parse_progress("pod-1", body) is None


def test_the_message_tells_of_the_engine_that_has_longest_to_go() -> None:
    told = with_progress(LOADING, [LOAD])
    assert told is not None
    assert told.message == "The engine loads the model: Load 43 %, about 20 s more."
    slow = {"pod": "pod-2", "phase": "Download", "percent": 2, "etaSeconds": 600}
    told = with_progress(LOADING, [LOAD, slow])
    assert told is not None
    assert told.message.endswith("Download 2 %, about 10 min more (pod-2, of 2 that start).")
    stall = Cause("ModelNotFound", "no folder", True)
    assert [with_progress(cause, [LOAD]) for cause in (stall, None)] == [stall, None]
    assert with_progress(LOADING, []) == LOADING
