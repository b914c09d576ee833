"""An LLMService of an embedding model: Ready, answering by its Service, scaled by its load.

The model is a small random one, written by the test: what is shown is the way to it.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model
import openai
import pytest
import stack
from kube import Kubectl, show_services, wait_ready, wait_until

from pagoda_runtime import LLM
from pagoda_runtime.models.testing import make_tiny_pooled_checkpoint

NAMESPACE, NAME = "e2e-embeddings", "embedder"
TEXTS = ["a text", "another one that is longer", "é"]
# Large enough that clients find requests running.
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SERVICE: dict[str, Any] = {
    "apiVersion": "pagoda.dev/v1alpha1",
    "kind": "LLMService",
    "metadata": {"name": NAME},
    "spec": {
        "model": {"uri": f"pvc://models/{NAME}"},
        "engine": {"maxNumSeqs": 4},
        "resources": {"gpu": {"count": 0}, "cpu": "200m", "memory": "2Gi"},
        "autoscaling": {"maxReplicas": 2, "scaleDown": {"stabilizationSeconds": 5}},
    },
}


def ensure_embedder() -> Path:
    """The folder of the model, beside that of the demo."""
    folder = model.model_folder().with_name(NAME)
    shutil.rmtree(folder, ignore_errors=True)
    make_tiny_pooled_checkpoint(folder, "bert", modules=True, **SHAPE)
    for path in folder.rglob("*"):
        # They are made for their owner alone, whom a pod does not run as.
        path.chmod(0o755 if path.is_dir() else 0o644)
    model.marker_of(folder).write_text("as each run makes it")
    return folder


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_embedder()


@pytest.fixture(scope="module")
def kubectl(target: stack.Target, images: dict[str, str], folder: Path) -> Iterator[Kubectl]:
    stack.install_operator(target, images)
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        stack.ensure_model_volume(target, kubectl, images, [folder])
        kubectl.apply(SERVICE)
        wait_ready(kubectl, NAME)
        yield kubectl


def status_of(kubectl: Kubectl) -> dict[str, Any]:
    status: dict[str, Any] = (kubectl.get("llmservice", NAME) or {}).get("status", {})
    return status


@pytest.fixture
def client(kubectl: Kubectl) -> Iterator[openai.OpenAI]:
    address = kubectl.json("get", "service", NAME)["spec"]["clusterIP"]
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(client: openai.OpenAI, texts: list[str]) -> list[list[float]]:
    return [each.embedding for each in client.embeddings.create(model=NAME, input=texts).data]


def score(client: openai.OpenAI, text: str, others: list[str]) -> list[float]:
    body = {"model": NAME, "text_1": text, "text_2": others}
    answer: dict[str, Any] = client.post("/score", body=body, cast_to=dict[str, Any])
    return [each["score"] for each in answer["data"]]


def test_the_service_embeds_and_scores_as_the_offline_class_does(
    client: openai.OpenAI, folder: Path
) -> None:
    with LLM(str(folder), device="cpu") as llm:
        vectors, scores = llm.embed(TEXTS), llm.score(TEXTS[0], TEXTS[1:])
    for found, wanted in zip(embed(client, TEXTS), vectors, strict=True):
        assert found == pytest.approx(list(wanted), abs=1e-4)
    assert score(client, TEXTS[0], TEXTS[1:]) == pytest.approx(scores, abs=1e-4)


def test_the_status_says_what_runs(kubectl: Kubectl) -> None:
    report = wait_until("a report", lambda: status_of(kubectl).get("model"))
    assert (report["architecture"], report["kvCacheDtype"]) == ("BertModel", "none")


def test_clients_of_embeddings_make_two_replicas_and_silence_makes_one(
    kubectl: Kubectl, client: openai.OpenAI
) -> None:
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            assert len(embed(client, ["x" * 60] * 8)) == 8

    def wait_for(replicas: int) -> None:
        wait_until(
            f"{replicas} replicas wanted",
            lambda: status_of(kubectl).get("desiredReplicas") == replicas,
            timeout_seconds=60,
            on_timeout=lambda: show_services(kubectl),
        )

    wait_for(1)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        # Of 40 texts: each counts as a request.
        clients = [pool.submit(keep_asking) for _ in range(5)]
        try:
            wait_for(2)
        finally:
            stop.set()
        for asked in clients:
            asked.result()
    wait_for(1)
