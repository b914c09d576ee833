"""Asking an engine what it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from pagoda_operator.engines import Engines
from pagoda_operator.names import Key
from pagoda_operator.reports import Reports, parse_report
from pagoda_operator.testing import KEY, make_pod

MODEL = {
    "architecture": "Gemma3ForCausalLM",
    "quantization": "compressed-tensors",
    "kv_cache_dtype": "fp8_e4m3",
    "tensor_parallel_size": 2,
}
REPORT = {
    "architecture": "Gemma3ForCausalLM",
    "quantization": "CompressedTensors",
    "kvCacheDtype": "FP8E4M3",
    "tensorParallelSize": 2,
}
READY = {"ready": True, "ip": "127.0.0.1"}


class Engine:
    """Answers `/startup` with the status and the body that it has."""

    def __init__(self) -> None:
        self.num_asked, self.status, self.body = 0, 200, json.dumps({"model": MODEL})

    async def answer(self, _: web.Request) -> web.Response:
        self.num_asked += 1
        return web.Response(status=self.status, text=self.body)


@pytest.fixture
async def engine(unused_tcp_port: int) -> AsyncIterator[Engine]:
    made = Engine()
    app = web.Application()
    app.router.add_get("/startup", made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    yield made
    await runner.cleanup()


@pytest.fixture
async def changes() -> asyncio.Queue[Key]:
    return asyncio.Queue()


@pytest.fixture
async def reports(
    engine: Engine, changes: asyncio.Queue[Key], unused_tcp_port: int
) -> AsyncIterator[Reports]:
    engines = Engines(unused_tcp_port)
    made = Reports(engines, changes.put_nowait)
    yield made
    await made.close()
    await engines.close()


def find(reports: Reports, *pods: Any, revision: str = "rev") -> Any:
    return reports.find(KEY, pods, revision)


async def test_an_engine_is_asked_once_and_told_in_the_words_of_the_crd(
    engine: Engine, reports: Reports, changes: asyncio.Queue[Key]
) -> None:
    pod = make_pod("rev", **READY)
    assert find(reports, pod) is None
    assert await asyncio.wait_for(changes.get(), 5) == KEY
    assert [find(reports, pod) for _ in range(3)] == [REPORT] * 3
    assert engine.num_asked == 1


async def test_only_ready_pods_of_the_revision_are_asked(engine: Engine, reports: Reports) -> None:
    assert find(reports, make_pod("old", **READY), make_pod("rev", ip="127.0.0.1")) is None
    await asyncio.sleep(0.05)
    assert engine.num_asked == 0


@pytest.mark.parametrize("successor", [{"name": "pod-2"}, {"container": {"restartCount": 1}}])
async def test_the_engine_in_the_place_of_one_that_is_gone_is_asked_anew(
    engine: Engine, reports: Reports, changes: asyncio.Queue[Key], successor: dict[str, Any]
) -> None:
    find(reports, make_pod("rev", **READY))
    await asyncio.wait_for(changes.get(), 5)
    engine.body = json.dumps({"model": {**MODEL, "quantization": "awq"}})
    after = make_pod("rev", **READY, **successor)
    assert find(reports, after) is None
    await asyncio.wait_for(changes.get(), 5)
    assert find(reports, after) == {**REPORT, "quantization": "AWQ"}


async def test_a_silent_engine_is_asked_until_it_answers(
    engine: Engine,
    reports: Reports,
    changes: asyncio.Queue[Key],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pagoda_operator.reports.backoff_seconds", lambda *_: 0.01)
    engine.status, pod = 503, make_pod("rev", **READY)
    assert find(reports, pod) is None
    while engine.num_asked < 3:
        await asyncio.sleep(0.01)
    engine.status = 200
    await asyncio.wait_for(changes.get(), 5)
    assert find(reports, pod) == REPORT


async def test_an_engine_that_says_nothing_of_its_model_is_not_asked_again(
    engine: Engine, reports: Reports, changes: asyncio.Queue[Key]
) -> None:
    engine.body, pod = '{"phase": "ready"}', make_pod("rev", **READY)
    find(reports, pod)
    await asyncio.wait_for(changes.get(), 5)
    assert (find(reports, pod), engine.num_asked) == ({}, 1)


def test_a_word_that_the_crd_has_not_is_told_as_it_is() -> None:
    model = {**MODEL, "quantization": "mxfp4", "kv_cache_dtype": "bfloat16"}
    report = parse_report(json.dumps({"model": model}).encode())
    assert report == {**REPORT, "quantization": "mxfp4", "kvCacheDtype": "BFloat16"}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "[" * 15000,
        '{"model": 1}',
        '{"model": {}}',
        *(
            json.dumps({"model": {**MODEL, **change}})
            for change in (
                {"architecture": ""},
                {"architecture": "x" * 64},
                {"architecture": "two words"},
                {"quantization": None},
                {"kv_cache_dtype": ["fp8"]},
                {"tensor_parallel_size": True},
                {"tensor_parallel_size": 0},
                {"tensor_parallel_size": 1025},
            )
        ),
    ],
)
def test_what_is_not_an_engines_answer_is_no_report(body: str) -> None:
    assert parse_report(body.encode()) == {}
