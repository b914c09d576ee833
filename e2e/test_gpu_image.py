"""What Triton needs in the pod of an engine on a GPU, as far as it goes without one: a C compiler,
Python's headers, ptxas, and a cache that can be written to and outlives the container."""

from __future__ import annotations

import json
from typing import Any

import pytest
import stack
from kube import Kubectl, wait_until

from pagoda_operator.names import Manifest
from pagoda_operator.pod import render_pod_template
from pagoda_operator.testing import make_service

PROBE = stack.ROOT / "e2e" / "triton_probe.py"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def probe_pod(image: str) -> Manifest:
    """The pod of an engine on a GPU, with the probe in the engine's place and without the GPU."""
    volume = {"name": "probe", "configMap": {"name": "probe"}}
    mount = {"name": "probe", "mountPath": "/probe", "readOnly": True}
    added = {"volumes": [volume], "volumeMounts": [mount]}
    service = make_service({"model": {"uri": "hf://org/model"}, "podTemplate": added})
    spec = render_pod_template(service, image)["spec"]
    del spec["serviceAccountName"]
    (container,) = spec["containers"]
    for field in ("args", "resources", "startupProbe", "readinessProbe", "livenessProbe"):
        del container[field]
    container["command"] = ["python", f"/probe/{PROBE.name}"]
    spec["restartPolicy"] = "OnFailure"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec}


def runs(kubectl: Kubectl) -> list[dict[str, Any]]:
    """What each run of the probe found; its last one tells of all, among warnings of Triton."""
    lines = kubectl.run("logs", "probe").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_a_pod_compiles_kernels_and_their_launcher_and_finds_them_after_a_restart(
    target: stack.Target, images: dict[str, str], crds: None
) -> None:
    with stack.restricted_namespace(target.kubectl, "e2e-gpu-image") as kubectl:
        kubectl.run("create", "configmap", "probe", f"--from-file={PROBE}")
        kubectl.apply(probe_pod(images["runtime"]))
        wait_until(
            "the probe run twice",
            lambda: kubectl.json("get", "pod", "probe")["status"]["phase"] == "Succeeded",
            timeout_seconds=180,
            on_timeout=lambda: kubectl.run("logs", "probe"),
        )
        first, second = runs(kubectl)
    assert first["uid"] == 65532
    assert first["launcher"].startswith("/cache/triton/")
    assert first["cubin_bytes"] > 0
    # The kernel in each of the compiler's languages, and the launcher.
    assert first["num_files_made"] >= 7
    assert second == {**first, "num_files_made": 0}
