"""Operators of the bench: processes that are forked, watched, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.api import Api
from faults.proxy import FaultProxy

ENGINE_IMAGE = "pagoda.invalid/engine:1"
RESTART_SECONDS = 0.2
READY_SECONDS = 300.0
WATCHED = frozenset(
    {
        *("llmservices", "deployments", "services", "serviceaccounts", "pods"),
        *("poddisruptionbudgets", "networkpolicies", "jobs"),
    }
)


class Zygote:
    """`async with Zygote(folder)`: forks operators; see `zygote.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._started: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}

    async def __aenter__(self) -> Zygote:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "faults.zygote"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        # The imports are done.
        await self._process.stdout.readline()
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._listening

    async def start(self, **order: Any) -> tuple[int, asyncio.Future[int]]:
        """A new operator: its pid, and how it will have ended."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        started = asyncio.get_running_loop().create_future()
        self._started[number] = started
        line = json.dumps({"order": number, **order}).encode() + b"\n"
        self._process.stdin.write(line)
        pid = await started
        return pid, self._ended[pid]

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            news = json.loads(line)
            if "started" in news:
                pid = news["started"]
                self._ended[pid] = asyncio.get_running_loop().create_future()
                self._started.pop(news["order"]).set_result(pid)
            else:
                self._ended.pop(news["ended"]).set_result(news["status"])
        for ended in self._ended.values():
            # Killed by the zygote as it ended.
            ended.set_result(-signal.SIGKILL)


@dataclass(slots=True, kw_only=True)
class Life:
    """One process from its start to its end; times are of a monotonic clock."""

    pid: int
    started: float
    first_request: int
    """The number of the first request that is its own."""
    ended: float | None = None
    status: int | None = None


@dataclass(slots=True)
class Operator:
    """An operator behind a proxy of its own, which is started again whenever it ends."""

    zygote: Zygote
    proxy: FaultProxy
    namespace: str
    token: str
    options: dict[str, Any] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    _task: asyncio.Task[None] = field(init=False)
    _is_stopping: bool = False
    health_port: int = 0

    @property
    def log_file(self) -> Path:
        return self.zygote.folder / f"operator-{self.namespace}.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def num_restarts(self) -> int:
        return len(self.lives) - 1

    async def __aenter__(self) -> Operator:
        self.proxy.kill = self.kill
        self._task = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_stopping = True
        self.kill()
        await self._task

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.lives and self.lives[-1].ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.lives[-1].pid, number)

    async def wait_ready(self) -> None:
        """Until the present process watches everything."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            life = self.lives[-1] if self.lives else None
            if life is not None and life.ended is None and self._watches_all(life):
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the operator of {self.namespace} is not ready:\n{self.log[-3000:]}")

    def _watches_all(self, life: Life) -> bool:
        return self.proxy.watched(life.first_request) >= WATCHED

    def rss_bytes(self) -> int:
        """Resident memory of the present process."""
        status = Path(f"/proc/{self.lives[-1].pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    async def _supervise(self) -> None:
        while not self._is_stopping:
            self.health_port = _free_port()
            arguments = ["--engine-image", ENGINE_IMAGE, "--namespace", self.namespace]
            arguments += ["--health-port", str(self.health_port)]
            first_request = len(self.proxy.record)
            pid, ended = await self.zygote.start(
                arguments=arguments,
                log=str(self.log_file),
                kubeconfig=str(self._write_kubeconfig()),
                **self.options,
            )
            life = Life(pid=pid, started=time.monotonic(), first_request=first_request)
            self.lives.append(life)
            if self._is_stopping:
                self.kill()
            life.status = await ended
            life.ended = time.monotonic()
            await asyncio.sleep(RESTART_SECONDS)

    def _write_kubeconfig(self) -> Path:
        path = self.zygote.folder / f"kubeconfig-{self.namespace}"
        server = f"http://127.0.0.1:{self.proxy.port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": {"server": server}}],
            "users": [{"name": "operator", "user": {"token": self.token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "operator"}}],
            "current-context": "bench",
        }
        path.write_text(json.dumps(config))
        return path


async def make_namespace(api: Api, name: str, rights: list[dict[str, Any]]) -> str:
    """A namespace with the chart's rights for an operator; returns the operator's token."""
    metadata = {"name": name}
    await api.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}, may_exist=True
    )
    for manifest in rights:
        text = json.dumps(manifest).replace(RIGHTS_NAMESPACE, name)
        await api.create(json.loads(text), may_exist=True)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/pagoda-operator/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = await api.request("POST", account, request)
    return str(token["status"]["token"])


RIGHTS_NAMESPACE = "rights-of-the-bench"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
