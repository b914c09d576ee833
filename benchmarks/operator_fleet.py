"""A control plane, nodes of kwok, engines of a stub, and the operator beside them.

The operator is the real process, and has the rights of the chart's own ServiceAccount.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from audit import AuditLog, Request
from cluster import lifecycle
from cluster.control_plane import control_plane
from cluster.fake_nodes import fake_nodes, node
from cluster.settings import environment_settings
from kube import Kubectl, condition, wait_until
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from operator_process import OperatorProcess
from stack import OPERATOR_NAMESPACE, apply_crds

from pagoda_operator.cluster import ApiServer, Unavailable
from pagoda_operator.lease import CLUSTER_NAME
from pagoda_operator.names import KIND, Manifest
from pagoda_operator.telemetry import Telemetry

NUM_NAMESPACES = 10
NUM_NODES = 10
MANAGER = "bench-operator"
ACCOUNT = f"system:serviceaccount:{OPERATOR_NAMESPACE}:pagoda-operator"
# Of the bench's own requests.
MAX_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Fleet:
    """LLMServices and the operator that serves them."""

    operator: OperatorProcess
    kubeconfig: str
    audit_log: Path
    num_services: int
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))

    def manifest(self, number: int, **spec: Any) -> Manifest:
        """The LLMService of that number."""
        namespace = f"fleet-{number % NUM_NAMESPACES}"
        return {
            "apiVersion": "pagoda.dev/v1alpha1",
            "kind": KIND,
            "metadata": {"name": f"chat-{number}", "namespace": namespace},
            "spec": {"model": {"uri": "hf://org/model"}, **spec},
        }

    async def apply(self, api: ApiServer, numbers: Sequence[int], **spec: Any) -> None:
        """Apply these services with what their spec has beside the model."""
        await asyncio.gather(*(self._apply(api, self.manifest(it, **spec)) for it in numbers))

    async def _apply(self, api: ApiServer, manifest: Manifest) -> None:
        async with self._slots:
            while True:
                # A machine that is too busy delays the bench, which is no reason to end it.
                with contextlib.suppress(Unavailable):
                    await api.apply(manifest, manager=MANAGER, force=True)
                    return

    async def wait(self, api: ApiServer, what: str, timeout_seconds: float) -> float:
        """Seconds until every service is so: "seen" in its present generation, or "Ready"."""
        started = time.monotonic()
        while True:
            services: list[Manifest] = []
            with contextlib.suppress(Unavailable):
                services = await api.list(KIND, None)
            num_right = sum(is_seen(it) and (what == "seen" or is_ready(it)) for it in services)
            seconds = time.monotonic() - started
            if num_right == self.num_services:
                return seconds
            if seconds > timeout_seconds:
                raise TimeoutError(
                    f"{num_right} of {self.num_services} services are {what} after "
                    f"{timeout_seconds:.0f} s: {self.operator.log[-2000:]}"
                )
            await asyncio.sleep(2.0)

    async def connect(self) -> ApiServer:
        """The bench's own way to the API server."""
        configuration = Configuration()
        await config.load_kube_config(self.kubeconfig, client_configuration=configuration)
        return ApiServer(ApiClient(configuration), Telemetry())

    def watch_requests(self) -> AuditLog:
        """The audit log from now on."""
        return AuditLog(self.audit_log)


def is_seen(service: Manifest) -> bool:
    return bool(
        service.get("status", {}).get("observedGeneration") == service["metadata"]["generation"]
    )


def is_ready(service: Manifest) -> bool:
    return condition(service, "Ready").get("status") == "True"


def by_operator(requests: Sequence[Request]) -> list[Request]:
    """What the operator asked for, its own Lease aside."""
    own = ("leases", CLUSTER_NAME)
    return [it for it in requests if it.user == ACCOUNT and (it.resource, it.name) != own]


def resident_bytes(pid: int) -> tuple[int, int]:
    """What a process holds now, and what it held at most."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def cpu_seconds(pid: int) -> float:
    """What a process took of the cores since its start."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def fleet(num_services: int, folder: Path) -> Iterator[Fleet]:
    """Everything but the services."""
    settings = replace(environment_settings(), state=folder / "plane")
    with control_plane(settings) as settings, fake_nodes(settings), _stub():
        paths = lifecycle.paths(settings)
        kubectl = Kubectl(paths["kubectl"], kubeconfig=paths["kubeconfig"])
        names = [OPERATOR_NAMESPACE, *(f"fleet-{it}" for it in range(NUM_NAMESPACES))]
        # A rollout takes a GPU for the new pod before it gives back the old one's.
        room = 2 * num_services // NUM_NODES + 10
        nodes = [node(f"node-{it}", num_gpus=room, num_pods=room) for it in range(NUM_NODES)]
        namespaces = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in names
        ]
        items = [*namespaces, *nodes]
        kubectl.apply({"apiVersion": "v1", "kind": "List", "items": items})
        apply_crds(kubectl)
        kubectl.run("wait", "--for=condition=Established", "crd/llmservices.pagoda.dev")
        home = kubectl.in_namespace(OPERATOR_NAMESPACE)
        log = folder / "operator.log"
        operator = OperatorProcess(home, log, is_cluster_wide=True)
        operator.start(wait=False)
        try:
            wait_until("it is ready", lambda: operator.readiness() == "ok", timeout_seconds=600)
            yield Fleet(operator, paths["kubeconfig"], settings.audit_log, num_services)
        finally:
            operator.stop()


@contextmanager
def _stub() -> Iterator[None]:
    command = [sys.executable, str(Path(__file__).parent / "operator_stub.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the stub of the engines does not start")
        try:
            yield
        finally:
            process.kill()
