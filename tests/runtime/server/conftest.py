"""Real server processes, with an engine process without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pagoda_runtime.server.testing import ServerProcess

Start = Callable[..., ServerProcess]


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
