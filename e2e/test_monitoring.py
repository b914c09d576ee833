"""What prometheus-operator gets of a service, by its own CRDs on a real API server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import stack
from cluster.binaries import go_compiler
from cluster.settings import Settings
from kube import Kubectl, wait_until
from operator_process import OperatorProcess
from services import manifest, start_service

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
MODULE = "github.com/prometheus-operator/prometheus-operator@v0.89.0"
KINDS = ("podmonitors", "prometheusrules")
ALL = {"monitor": "Auto", "prometheusRule": True, "labels": {"release": "prometheus"}}


@pytest.fixture
def monitoring(target: stack.Target) -> Iterator[None]:
    """The CRDs of prometheus-operator, which come as a Go module as the cluster's programs do."""
    command = [
        go_compiler(Settings.from_environment(os.environ)),
        "mod",
        "download",
        "-json",
        MODULE,
    ]
    environment = {**os.environ, "GOFLAGS": "-mod=mod"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(json.loads(done.stdout)["Dir"]) / "example" / "prometheus-operator-crd"
    files = [str(folder / f"monitoring.coreos.com_{kind}.yaml") for kind in KINDS]
    names = [f"{kind}.monitoring.coreos.com" for kind in KINDS]
    for file in files:
        target.kubectl.run("apply", "--server-side", "-f", file)
    try:
        stack.wait_for_crds(target.kubectl, *names)
        yield
    finally:
        target.kubectl.run("delete", "crd", *names)


def test_monitor_and_alerts_are_made_by_the_charts_rights_and_go_with_the_wish(
    target: stack.Target, namespace: Kubectl, monitoring: None, tmp_path: Path
) -> None:
    with OperatorProcess(namespace, tmp_path / "log").running() as operator:
        start_service(namespace, observability=ALL)
        for kind in KINDS:
            child = wait_until(
                kind,
                lambda kind=kind: namespace.get(kind, "chat-engine"),
                on_timeout=lambda: operator.log,
            )
            assert child["metadata"]["labels"]["release"] == "prometheus"
        # One that starts later finds what is not wanted any more by looking for all there is.
        operator.stop()
        namespace.apply(manifest(observability={"monitor": "None"}))
        operator.start()
        wait_until(
            "none",
            lambda: not any(namespace.get(kind, "chat-engine") for kind in KINDS),
            on_timeout=lambda: operator.log,
        )
        assert "forbidden" not in operator.log
