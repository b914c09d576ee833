"""Ids of requests, the access log, and what browsers may do."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server

ORIGIN = "https://app.example.org"
PREFLIGHT = {"origin": ORIGIN, "access-control-request-method": "POST"}


@pytest_asyncio.fixture
async def http(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with the flags that the test's parameter names."""
    config = make_config("--api-key", "k", *getattr(request, "param", ()))
    async with (
        running_server(make_state(FakeEngine(config.engine), config)) as url,
        httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer k"}) as http,
    ):
        yield http


async def test_the_id_of_a_request_comes_back_in_its_answer(http):
    answer = await http.get("/v1/models", headers={"x-request-id": "a-1/b:2"})
    assert answer.headers["x-request-id"] == "a-1/b:2"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "h\xe9", "a\tb"])
async def test_without_a_usable_id_each_request_gets_one_of_its_own(http, given):
    headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
    answers = [await http.get("/version", headers=headers) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


async def test_errors_and_streams_carry_the_id_too(http):
    body = {"prompt": "a", "stream": True}
    headers = {"x-request-id": "mine"}
    for method, path, options, status in (
        ("GET", "/nowhere", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"json": body}, 200),
        ("GET", "/v1/models", {"headers": {"authorization": "Bearer wrong"}}, 401),
    ):
        options["headers"] = headers | options.get("headers", {})
        answer = await http.request(method, path, **options)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


async def test_no_page_of_another_origin_may_call_by_default(http):
    assert (await http.options("/v1/completions", headers=PREFLIGHT)).status_code == 405
    answer = await http.get("/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("http", [["--allowed-origins", ORIGIN]], indirect=True)
async def test_a_page_of_an_allowed_origin_may_call_and_read_the_id(http):
    preflight = {**PREFLIGHT, "access-control-request-headers": "authorization"}
    del http.headers["authorization"]
    asked = await http.options("/v1/completions", headers=preflight)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-headers"] == "authorization"
    refused = await http.get("/v1/models", headers={"origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    other = await http.get("/version", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "http",
    [["--allowed-origins", f'["{ORIGIN}"]', "--allow-credentials", "--allowed-methods", "GET"]],
    indirect=True,
)
async def test_methods_and_credentials_are_those_of_the_flags(http):
    asked = await http.options("/v1/completions", headers=PREFLIGHT)
    assert asked.status_code == 400
    answer = await http.get("/version", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-credentials"] == "true"


def test_at_level_debug_only_pagoda_tells_all():
    script = (
        "import logging; from pagoda_runtime.logs import configure_logging as c; c('debug')\n"
        "for n in ('pagoda.x', 'pagoda_runtime.x', 'numba.x'): logging.getLogger(n).debug('told')"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr
    names = re.findall(r"DEBUG (\S+): told", told)
    assert names == ["pagoda.x", "pagoda_runtime.x"]


def access_lines(server) -> list[str]:
    return [line for line in server.lines if " pagoda.access " in line]


def test_each_request_has_a_line_with_its_id_and_a_probe_one_for_debugging(start):
    server = start("--log-level", "debug", "--drain-delay-seconds", "0")
    url = server.wait_for_url()
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.05)
    headers = {"x-request-id": "mine"}
    httpx.get(f"{url}/v1/models/a%0Ab?c=%20d", headers=headers)
    httpx.get(f"{url}/health", headers=headers)
    server.process.send_signal(signal.SIGTERM)
    server.wait()
    request, probe = (line for line in access_lines(server) if "[mine]" in line)
    assert re.fullmatch(
        r"[-0-9]+ [:0-9,]+ INFO pagoda\.access \[mine\]: 127\.0\.0\.1:\d+ GET "
        r"/v1/models/a%0Ab\?c=%20d 404 0\.\d{3} s\n",
        request,
    )
    assert " DEBUG pagoda.access " in probe
    assert any(re.search(r" INFO pagoda\.testing: Loading a fake", one) for one in server.lines)


def test_the_log_level_is_that_of_both_processes(start):
    server = start("--log-level", "error", crash=True)
    assert server.wait() == 1
    lines = "".join(server.lines)
    assert " INFO " not in lines
    assert re.search(r"^[-0-9]+ [:0-9,]+ ERROR pagoda\.engine: The engine failed\.$", lines, re.M)
    assert "ValueError: crashed as told" in lines


def test_without_access_log_no_request_has_a_line(start):
    server = start("--disable-access-log", "--drain-delay-seconds", "0")
    httpx.get(f"{server.wait_for_url()}/version")
    server.process.send_signal(signal.SIGTERM)
    server.wait()
    assert not access_lines(server)
