"""A server with a fake engine in this process, and in processes of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server
from pagoda_runtime.server.testing_process import ServerProcess

# Schemas at random, which a benchmark makes too.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

Start = Callable[..., ServerProcess]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config().engine)


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    return make_state(engine, make_config("--served-model-name", "tiny"))


@pytest_asyncio.fixture
async def http(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "termination-log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    servers = []

    def start(*flags: str, **options: Any) -> ServerProcess:
        model = "fake:" + json.dumps({"vocab_size": 256, "max_model_len": 4000, **options})
        command = ["pagoda_runtime.server.testing", model, "--host", "127.0.0.1", "--port", "0"]
        servers.append(ServerProcess([*command, *flags], log))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
