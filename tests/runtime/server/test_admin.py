"""The admin port: who may ask, and what it answers."""

from __future__ import annotations

import httpx

from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server.admin import create_admin_app
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state


def connect(engine: FakeEngine, *flags: str) -> httpx.AsyncClient:
    app = create_admin_app(make_state(engine, make_config(*flags)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin")


async def test_the_prefix_cache_is_emptied_and_its_blocks_are_counted(engine):
    async with connect(engine) as http:
        answer = await http.post("/reset_prefix_cache")
    assert (answer.status_code, answer.json()) == (200, {"num_blocks": 7})


async def test_a_key_is_asked_for_on_every_path(engine):
    async with connect(engine, "--api-key", "secret") as http:
        for path in ("/reset_prefix_cache", "/"):
            assert (await http.post(path)).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert (await http.post("/reset_prefix_cache", headers=key)).status_code == 200


async def test_a_wrong_method_and_an_unknown_path_are_named(engine):
    async with connect(engine) as http:
        assert (await http.get("/reset_prefix_cache")).status_code == 405
        answer = await http.post("/v1/completions")
    assert answer.status_code == 404
    assert "/v1/completions" in answer.json()["error"]["message"]


async def test_forms_of_requests_are_those_of_the_other_port(engine):
    async with connect(engine) as http:
        lengths = {"content-length": "0", "transfer-encoding": "chunked"}
        assert (await http.post("/reset_prefix_cache", headers=lengths)).status_code == 400
        assert (await http.post("/reset_prefix_cache/")).status_code == 200


async def test_a_loading_and_a_dead_engine_are_503(engine):
    async with connect(engine) as http:
        ready, engine.ready = engine.ready, None
        answer = await http.post("/reset_prefix_cache")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        engine.ready = ready
        engine.failure = EngineFailed(reason="RankDied", message="it crashed")
        assert (await http.post("/reset_prefix_cache")).status_code == 503
