"""Models that are checked before there are pods, and what people are told, on a real API server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import stack
from audit import AuditLog
from kube import Kubectl, condition, wait_until
from llmservices import manifest
from operator_process import OperatorProcess

from pagoda_operator.testing import LLAMA_8B

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

L4 = {"gpu": {"products": ["NVIDIA-L4"]}}
FITTING, TOO_LONG = {"maxModelLen": 8192}, {"maxModelLen": 100_000}


class Hub(BaseHTTPRequestHandler):
    """Serves config.json of every model, and counts."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps(LLAMA_8B).encode()
        self.send_response(200 if self.path.endswith("/config.json") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Not on the terminal."""


@contextlib.contextmanager
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def team(
    target: stack.Target, crds: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kubectl]:
    """A namespace with an operator that has a hub."""
    log = tmp_path_factory.mktemp("operator") / "operator.log"
    with hub() as endpoint, stack.fresh_namespace(target.kubectl) as kubectl:
        flags = ["--hub-endpoint", endpoint]
        with OperatorProcess(kubectl, log, flags=flags).running() as operator:
            yield kubectl
            assert "Traceback" not in operator.log


def apply(team: Kubectl, name: str, **engine: Any) -> None:
    spec = {"model": {"uri": f"hf://org/{name}"}, "engine": engine, "resources": L4}
    team.apply(manifest(spec, name))


def wait_for(team: Kubectl, name: str, kind: str, reason: str) -> dict[str, Any]:
    """The service once a condition has the reason for its present generation."""

    def found() -> dict[str, Any] | None:
        service = team.get("llmservice", name) or {}
        entry = condition(service, kind)
        is_current = entry.get("observedGeneration") == service["metadata"]["generation"]
        return service if is_current and entry.get("reason") == reason else None

    return wait_until(
        f"{kind} {reason}",
        found,
        on_timeout=lambda: json.dumps(team.get("llmservice", name), indent=1),
    )


def status_command(team: Kubectl, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagoda_operator.main", "status", name, "-n", team.namespace]
    environment = {**os.environ, "KUBECONFIG": team.kubeconfig or os.environ.get("KUBECONFIG", "")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_does_not_fit_gets_no_pods_until_it_is_mended(team: Kubectl) -> None:
    apply(team, "long", **TOO_LONG)
    service = wait_for(team, "long", "Stalled", "DoesNotFit")
    assert "Lower engine.maxModelLen to at most" in condition(service, "Ready")["message"]
    assert service["status"]["preflight"]["result"] == "Failed"
    assert team.get("deployment", "long-engine") is None
    shown = status_command(team, "long")
    assert shown.returncode == 1, shown.stderr
    assert "DoesNotFit" in shown.stdout
    assert "\033" not in shown.stdout
    apply(team, "long", **FITTING)
    wait_until(
        "the Deployment",
        lambda: team.get("deployment", "long-engine"),
        on_timeout=lambda: json.dumps(team.get("llmservice", "long")),
    )
    service = wait_for(team, "long", "Stalled", "Progressing")
    assert service["status"]["preflight"]["result"] == "Passed"
    assert service["status"]["preflight"]["gpu"] == "NVIDIA-L4"


def test_pods_stay_when_a_change_would_not_fit(team: Kubectl) -> None:
    apply(team, "kept", **FITTING)
    wait_until("pods", lambda: team.get("deployment", "kept-engine"))
    before = team.json("get", "deployment", "kept-engine")["spec"]
    apply(team, "kept", **TOO_LONG)
    wait_for(team, "kept", "Stalled", "DoesNotFit")
    assert team.json("get", "deployment", "kept-engine")["spec"] == before


def test_a_refused_service_is_neither_written_nor_read_again(
    team: Kubectl, audit_log: AuditLog
) -> None:
    apply(team, "quiet", **TOO_LONG)
    wait_for(team, "quiet", "Stalled", "DoesNotFit")
    time.sleep(1)

    def reads_and_writes() -> list[str]:
        # The log has writes alone. Those about services of other tests may come late.
        written = [it for it in audit_log.requests(team.namespace) if it.name.startswith("quiet")]
        writes = [f"{it.verb} {it.resource}/{it.name}" for it in written if it.is_by_operator]
        return [path for path in Hub.asked if "/quiet/" in path] + writes

    before = reads_and_writes()
    team.run("annotate", "llmservice", "quiet", "note=1")
    time.sleep(3)
    assert reads_and_writes() == before
    # It was not for want of watching.
    apply(team, "quiet", **FITTING)
    wait_until("pods", lambda: team.get("deployment", "quiet-engine"))


def test_the_status_of_what_is_not_there_ends_with_2(team: Kubectl) -> None:
    shown = status_command(team, "nothing")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "there is no LLMService nothing" in shown.stderr
