"""The commands for people, as they are run."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagoda_operator import tools
from pagoda_operator.checkpoint import Tensors, read_checkpoint
from pagoda_operator.preflight import check
from pagoda_operator.status import stamp
from pagoda_operator.testing import (
    KEY,
    LLAMA_8B,
    MemoryCluster,
    make_manifest,
    make_pod,
    make_service,
)
from pagoda_operator.tools import UsageError, main, make_paint

NOW = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def write(folder: Path, *documents: Any) -> str:
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


def plan(folder: Path, spec: dict[str, Any], *flags: str) -> int:
    arguments = ["plan", "-f", write(folder, make_manifest(spec)), "--model-folder", str(folder)]
    return main([*arguments, *flags])


def on(product: str, **engine: Any) -> dict[str, Any]:
    return {"engine": engine, "resources": {"gpu": {"products": [product]}}}


def test_a_plan_shows_objects_memory_and_requests(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, on("NVIDIA-H100-80GB-HBM3", maxModelLen=8192)) == 0
    shown = capsys.readouterr().out
    for text in (
        "LLMService team/chat of pvc://models/gemma",
        "Deployment chat-engine",
        "1 replica, each with 1 × nvidia.com/gpu NVIDIA-H100-80GB-HBM3",
        "14.96 GiB  weights",
        "128 KiB each",
        "54 of them with 8,192 tokens fit the KV cache",
    ):
        assert text in shown
    assert "\033" not in shown


def test_a_plan_of_what_would_not_serve_ends_with_1_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, on("NVIDIA-L4", maxModelLen=100_000)) == 1
    assert "DoesNotFit: A request of engine.maxModelLen 100000" in capsys.readouterr().out


def test_the_gpu_may_be_named_where_the_spec_names_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, {}) == 0
    assert "names no GPU" in capsys.readouterr().out
    assert plan(folder, {"engine": {"maxModelLen": 100_000}}, "--gpu", "NVIDIA-L4") == 1


def test_the_size_of_a_folder_is_that_of_its_tensors(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    awq = {**LLAMA_8B, "quantization_config": {"quant_method": "awq", "group_size": 128}}
    (folder / "config.json").write_text(json.dumps(awq))
    head = json.dumps({"w": {"dtype": "I32", "shape": [1], "data_offsets": [0, 5 << 30]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    assert plan(folder, on("NVIDIA-L4")) == 0
    assert "5.00 GiB  weights" in capsys.readouterr().out


def test_the_manifests_of_a_plan_are_those_that_would_be_applied(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, {}, "-o", "yaml", "--engine-image", "engine:1") == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [it["kind"] for it in found] == ["ServiceAccount", "Service", "Deployment"]
    assert found[2]["spec"]["template"]["spec"]["containers"][0]["image"] == "engine:1"


def test_a_model_that_cannot_be_read_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = {"model": {"uri": "hf://org/model"}}
    path = write(tmp_path, make_manifest(hub), {"kind": "ConfigMap"}, None)
    assert main(["plan", "-f", path, "--hub-endpoint", "http://127.0.0.1:9"]) == 0
    assert "The model was not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("documents", "what"),
    [
        ([{"kind": "ConfigMap"}], "no object of kind LLMService"),
        ([{"kind": "LLMService", "metadata": None}], "no metadata.name"),
        ([{"kind": "LLMService", "metadata": {"name": "x"}}], "x: spec: an object is needed"),
        ([make_manifest({"replica": 1})], "chat: spec.replica: this operator does not know"),
        ([{"kind": "List", "items": None}], "no object of kind LLMService"),
        (
            [make_manifest({"engine": {"tensorParallelSize": 0}})],
            "spec.engine.tensorParallelSize is 0; it can be 1 to 16",
        ),
        ([make_manifest({"podTemplate": {"env": [{}]}})], "the API server would refuse it"),
    ],
)
def test_a_file_that_cannot_be_planned_ends_with_2(
    documents: list[Any], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-f", write(tmp_path, *documents)]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"a: [", b"\xff\xfe", b"items: 3", b"[" * 5000])
def test_a_file_that_is_missing_or_no_yaml_ends_with_2(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["plan", "-f", str(path)]) == 2
    assert capsys.readouterr().err.startswith("pagoda-operator plan: ")


@pytest.mark.parametrize("weights", [b"", b"\xff" * 100, bytes(8)])
def test_a_folder_with_a_broken_file_ends_with_2(
    weights: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_bytes(weights)
    assert plan(folder, {}) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_colours_are_for_terminals_without_no_color() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert make_paint(Terminal(), {})("x", "red") == "\033[31mx\033[0m"
    assert make_paint(Terminal(), {"NO_COLOR": "1"})("x", "red") == "x"
    assert make_paint(io.StringIO(), {})("x", "red") == "x"


async def show(
    *objects: dict[str, Any], events: list[dict[str, Any]] | None = None
) -> tuple[str, bool]:
    """What is said of the service among these objects."""
    cluster = MemoryCluster()
    for number, manifest in enumerate([*objects, *(events or [])]):
        manifest["metadata"].setdefault("name", f"object-{number}")
        cluster.put(manifest)
    lines, is_good = await tools.show(cluster, KEY, NOW, lambda text, style: text)
    return "\n".join(lines), is_good


def serving(reason: str = "", **fields: Any) -> dict[str, Any]:
    """The service with a status, which is well if there is no reason."""
    conditions: Any = {
        "Ready": (not reason, reason or "Serving", "what is wrong" if reason else "all serve"),
        "Available": (not reason, "ReplicasAvailable", ""),
        "Reconciling": (False, "Settled", ""),
        "Stalled": (bool(reason), reason or "Settled", "what is wrong"),
    }
    status = stamp({"summary": "1/1", **fields}, conditions, {}, 1, NOW - timedelta(minutes=5))
    return {**make_manifest(), "status": status}


async def test_a_service_that_is_well_says_little() -> None:
    pod = make_pod("r1", ready=True)
    pod["metadata"]["creationTimestamp"] = (NOW - timedelta(hours=2)).isoformat()
    text, is_good = await show(serving(), pod)
    assert is_good
    assert "Ready        True    Serving, for 5 min" in text
    assert "pod-1  ready, 0 restarts, no node, 2 h" in text
    assert "wrong" not in text


async def test_a_service_that_is_not_well_says_why_with_its_pods_and_warnings() -> None:
    pod = make_pod("r1", container={"state": {"waiting": {"reason": "ImagePullBackOff"}}})
    event = {
        "kind": "Event",
        "metadata": {},
        "reason": "Failed",
        "message": "no such\n\033[2Jimage",
        "lastTimestamp": (NOW - timedelta(seconds=30)).isoformat(),
        "involvedObject": {"name": "pod-1"},
    }
    text, is_good = await show(serving("ImagePullFailed"), pod, events=[event])
    assert not is_good
    assert "Stalled      True    ImagePullFailed, for 5 min\n               what is wrong" in text
    assert "ImagePullBackOff, 0 restarts" in text
    assert "Failed 30 s ago, pod-1: no such [2Jimage" in text


async def test_what_was_found_before_the_start_is_shown() -> None:
    spec = make_service(on("NVIDIA-L4")).spec
    fields = check(spec, read_checkpoint(LLAMA_8B, Tensors())).fields()
    text, _ = await show(serving(preflight=fields))
    assert "Passed on NVIDIA-L4: weights 15316Mi" in text
    assert "engine.maxModelLen will be about" in text


async def test_a_rollout_out_of_the_ordinary_and_an_older_image_are_shown() -> None:
    fields = {"strategy": "Surge", "reason": "Preferred", "message": "as always"}
    text, _ = await show(serving(rollout=fields))
    assert "as always" not in text
    fields |= {"strategy": "InPlace", "reason": "NoRoom", "message": "one at a time"}
    text, _ = await show(serving(rollout={**fields, "newerImage": "engine:2"}))
    assert "InPlace: one at a time" in text
    assert "older image than the operator's: engine:2" in text
    assert "engine.imagePolicy: Follow" in text


async def test_a_spec_that_no_operator_has_seen_is_not_well() -> None:
    text, is_good = await show(make_manifest() | {"status": {"observedGeneration": -1}})
    assert not is_good
    assert "The operator has not seen this spec yet" in text


async def test_a_service_that_is_not_there_is_no_service() -> None:
    with pytest.raises(UsageError, match="no LLMService chat in the namespace team"):
        await show()


def test_without_a_cluster_the_status_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["status", "chat"], "kubectl pagoda") == 2
    assert "kubectl pagoda status: no access to a Kubernetes API server" in capsys.readouterr().err
