"""The Job that reads a model: what it is, what it tells, and how it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagoda_operator.checkpoint import CheckpointError, Tensors, read_checkpoint
from pagoda_operator.checks import Checks, Verdict
from pagoda_operator.cluster import Conflict, Refused
from pagoda_operator.hub import Unreadable
from pagoda_operator.inspection import hear, is_for_job, render_inspection, tell
from pagoda_operator.inspections import Inspections
from pagoda_operator.names import LABEL_JOB, LABEL_SERVICE, Manifest
from pagoda_operator.testing import LLAMA_8B, MemoryCluster, make_service
from pagoda_operator.tools import main

GPTQ = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"weights": {"group_size": 128}}},
        "kv_cache_scheme": {"type": "float", "num_bits": 8},
    }
}
PRIVATE = {"uri": "hf://org/gated", "revision": "v1", "credentialsSecretRef": {"name": "hub"}}


@pytest.mark.parametrize(
    "config",
    [
        {},
        GPTQ,
        {"architectures": ["BertModel"], "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "head_dim": 64},
    ],
)
def test_what_a_job_tells_is_what_it_read(config: dict[str, Any]) -> None:
    values, tensors = {**LLAMA_8B, **config}, Tensors(16_000_000_000)
    line = tell(values, tensors)
    assert hear(line) == read_checkpoint(values, tensors)
    # Kubernetes cuts a message there.
    assert len(line) < 4096


def test_a_model_that_cannot_be_served_is_told_of_too() -> None:
    found = hear(tell({**LLAMA_8B, "architectures": ["GPT2LMHeadModel"]}, Tensors()))
    assert isinstance(found, CheckpointError)
    assert found.reason == "UnsupportedArchitecture"
    assert "GPT2LMHeadModel" in str(found)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Traceback",
        "[]",
        "3",
        "null",
        "{}",
        json.dumps({"reason": "SecretMissing", "message": "pay"}),
        tell(LLAMA_8B, Tensors()).replace("4096", "1e9"),
        tell(LLAMA_8B, Tensors()).replace('"quantization": null', '"quantization": 3'),
    ],
)
def test_what_no_job_of_ours_tells_is_not_believed(line: str) -> None:
    assert hear(line) is None


def test_a_job_takes_no_gpu_and_is_no_engine() -> None:
    spec = {
        "resources": {"gpu": {"products": ["NVIDIA-L4"]}},
        "podTemplate": {"nodeSelector": {"pool": "gpu"}},
        "auth": {"apiKeysSecretRef": {"name": "keys"}},
    }
    job = render_inspection(make_service(spec), "operator:1")
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert "nvidia.com/gpu" not in json.dumps(container["resources"])
    assert LABEL_SERVICE not in template["metadata"]["labels"]
    assert container["args"] == ["inspect", "/models/gemma"]
    assert {it["name"] for it in template["spec"]["volumes"]} == {"tmp", "models"}
    assert template["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert "NVIDIA-L4" in json.dumps(template["spec"]["affinity"])
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_private_model_is_read_with_the_token_that_only_the_job_has() -> None:
    service = make_service({"model": PRIVATE})
    assert is_for_job(service)
    (container,) = render_inspection(service, "operator:1")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["args"] == ["inspect", "hf://org/gated", "--revision", "v1"]
    (token,) = (it for it in container["env"] if it["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}


@pytest.mark.parametrize(
    ("uri", "is_read"),
    [
        ("hf://org/model", False),
        ("s3://bucket/model", False),
        ("https://host/model", True),
        ("pvc://claim/model", True),
    ],
)
def test_what_the_operator_cannot_reach_or_should_not_ask_is_for_a_job(
    uri: str, is_read: bool
) -> None:
    service = make_service({"model": {"uri": uri}})
    assert is_for_job(service) == is_read
    if is_read:
        (container,) = render_inspection(service, "operator:1")["spec"]["template"]["spec"][
            "containers"
        ]
        assert container["args"][0] == "inspect"


def test_another_model_token_or_image_has_another_job() -> None:
    other = {**PRIVATE, "credentialsSecretRef": {"name": "other"}}
    specs: list[dict[str, Any]] = [{}, {"model": PRIVATE}, {"model": other}]
    jobs = [render_inspection(make_service(spec), "operator:1") for spec in specs]
    jobs.append(render_inspection(make_service(), "operator:2"))
    assert len({job["metadata"]["name"] for job in jobs}) == 4
    changed = make_service({"engine": {"maxModelLen": 100}, "replicas": 3})
    assert render_inspection(changed, "operator:1") == jobs[0]


class JobCluster(MemoryCluster):
    """Ends every Job at the second look, its pod with a message."""

    def __init__(self, message: str | None, kind: str = "Complete") -> None:
        super().__init__()
        self.message, self.kind, self.refusal = message, kind, ""

    async def write(self, manifest: Manifest) -> Manifest:
        if self.refusal:
            raise Refused(self.refusal)
        if ("Job", manifest["metadata"]["name"]) in self.objects:
            raise Conflict("it exists")
        self.writes.append(("create", "Job", manifest["metadata"]["name"]))
        return self.put(manifest)

    async def pass_time(self, seconds: float) -> None:
        for kind, name in list(self.objects):
            if kind == "Job" and self.message is not None:
                self.objects[kind, name]["status"] = {
                    "conditions": [{"type": self.kind, "status": "True"}]
                }
                ended = {"state": {"terminated": {"message": self.message}}}
                metadata = {"name": f"{name}-pod", "labels": {LABEL_JOB: name}}
                status = {"containerStatuses": [ended]}
                self.put({"kind": "Pod", "metadata": metadata, "status": status})

    def inspections(self) -> Inspections:
        return Inspections(self, "operator:1", self.pass_time)


async def test_a_job_is_made_heard_and_deleted() -> None:
    cluster = JobCluster(tell(LLAMA_8B, Tensors()))
    found = await cluster.inspections().read(make_service())
    assert found == read_checkpoint(LLAMA_8B, Tensors())
    assert [verb for verb, kind, _ in cluster.writes if kind == "Job"] == ["create", "delete"]


async def test_the_job_of_an_operator_that_is_gone_is_heard() -> None:
    cluster = JobCluster(tell(LLAMA_8B, Tensors()))
    cluster.put(render_inspection(make_service(), "operator:1"))
    await cluster.inspections().read(make_service())
    assert [verb for verb, *_ in cluster.writes] == ["delete"]


async def test_a_strangers_job_is_left_alone() -> None:
    cluster = JobCluster(tell(LLAMA_8B, Tensors()))
    job = render_inspection(make_service(), "operator:1")
    cluster.put({**job, "metadata": {**job["metadata"], "ownerReferences": []}})
    with pytest.raises(Unreadable, match="another's"):
        await cluster.inspections().read(make_service())
    assert not cluster.writes


@pytest.mark.parametrize(
    ("message", "kind", "what"),
    [
        ("pagoda-operator inspect: no such folder", "Failed", "no such folder"),
        ("", "Complete", "told nothing"),
        (None, "", "it did not end in time"),
    ],
)
async def test_a_job_that_tells_nothing_is_unreadable_and_deleted(
    message: str | None, kind: str, what: str
) -> None:
    cluster = JobCluster(message, kind)
    with pytest.raises(Unreadable, match=what):
        await cluster.inspections().read(make_service())
    assert cluster.writes[-1][:2] == ("delete", "Job")


async def test_a_job_that_may_not_be_made_is_a_warning() -> None:
    cluster = JobCluster(None)
    cluster.refusal = "exceeded quota"
    with pytest.raises(Unreadable, match="exceeded quota"):
        await cluster.inspections().read(make_service())


async def test_a_model_on_a_claim_is_judged_once_its_job_has_told() -> None:
    cluster, told = JobCluster(tell(LLAMA_8B, Tensors())), []
    checks = Checks(None, lambda: 1000.0, told.append, cluster.inspections())
    gpu = {"gpu": {"products": ["NVIDIA-L4"]}}
    service = make_service({"engine": {"maxModelLen": 100_000}, "resources": gpu})
    first = checks.judge(service)
    assert first.cause is not None
    assert first.cause.reason == "CheckingModel"
    for read in list(checks._models.values()):
        assert read.task is not None
        await read.task
    assert told == [service.key]
    verdict = checks.judge(service)
    assert verdict.cause is not None
    assert verdict.cause.reason == "DoesNotFit"
    public = make_service({"model": {"uri": "hf://org/model"}})
    assert checks.judge(public) == Verdict()
    await checks.close()


def test_the_command_of_a_job_tells_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    assert main(["inspect", str(tmp_path)]) == 0
    assert hear(log.read_text()) == read_checkpoint(LLAMA_8B, Tensors())
    assert capsys.readouterr().out.strip() == log.read_text()


def test_a_command_that_cannot_tell_says_why_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "config.json" in log.read_text()
