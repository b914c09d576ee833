"""The example of a quantized model, on the CPU: every format serves, and the status says what runs.

The services of this file run one after the other, each of two ranks with a KV cache in 8 bits.
"""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import quantized
import stack
import yaml
from kube import Kubectl, condition, show_services, wait_ready, wait_until

from pagoda_runtime import LLM, SamplingParams

NAMESPACE = "e2e-quantized"
MAX_TOKENS = 16
# Each likeliest token is so by far, which the bits of a sum over two ranks do not change.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,",
    "0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2",
)
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def service(quantization: str, checkpoint: str | None = None) -> dict[str, Any]:
    """That of the example, with what a small model on a CPU needs."""
    manifest: dict[str, Any] = yaml.safe_load((stack.ROOT / "examples/quantized.yaml").read_text())
    manifest["metadata"]["name"] = quantization.lower()
    spec = manifest["spec"]
    spec["model"]["uri"] = f"pvc://models/gemma-3-270m-{(checkpoint or quantization).lower()}"
    spec["engine"] |= {"quantization": quantization, "maxModelLen": 512}
    spec["resources"] = {"gpu": {"count": 0}, "cpu": "200m", "memory": "5Gi"}
    spec["autoscaling"] = {"maxReplicas": 2, "scaleDown": {"stabilizationSeconds": 5}}
    return manifest


@pytest.fixture(scope="module")
def kubectl(target: stack.Target, images: dict[str, str]) -> Iterator[Kubectl]:
    """A namespace with the model in all formats, and the operator from the chart beside it."""
    stack.install_operator(target, images)
    folders = [quantized.ensure_quantized(name) for name in quantized.FORMATS]
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        stack.ensure_model_volume(target, kubectl, images, folders)
        yield kubectl


@functools.cache
def tokens_of_one_rank(name: str) -> list[list[int]]:
    """What the prompts are continued with offline, by the same flags."""
    folder = str(quantized.ensure_quantized(name))
    flags = {"kv_cache_dtype": "fp8", "max_num_seqs": 8, "max_model_len": 512}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(folder, quantization=name, device="cpu", **flags) as llm:
        results = llm.generate(list(PROMPTS), params, use_tqdm=False)
    return [result.outputs[0].token_ids for result in results]


def complete(kubectl: Kubectl, name: str, prompt: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """The tokens of an answer of the service."""
    address = kubectl.json("get", "service", name)["spec"]["clusterIP"]
    body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    response = httpx.post(f"http://{address}/v1/completions", json=body, timeout=300)
    response.raise_for_status()
    tokens = response.json()["choices"][0]["logprobs"]["tokens"]
    return [int(token.removeprefix("token_id:")) for token in tokens]


def status_of(kubectl: Kubectl, name: str) -> dict[str, Any]:
    status: dict[str, Any] = (kubectl.get("llmservice", name) or {}).get("status", {})
    return status


def serve(kubectl: Kubectl, quantization: str) -> None:
    """Have a Ready service of this format, and none of another one."""
    name = quantization.lower()
    for other in kubectl.items("llmservices"):
        if (found := other["metadata"]["name"]) != name:
            kubectl.run("delete", "llmservice", found)
    kubectl.apply(service(quantization))
    wait_ready(kubectl, name)


@pytest.mark.parametrize("quantization", ["FP8", "GPTQ", "AWQ"])
def test_two_ranks_answer_as_one_does_and_the_status_says_what_runs(
    kubectl: Kubectl, quantization: str
) -> None:
    serve(kubectl, quantization)
    name = quantization.lower()
    report = wait_until("a report", lambda: status_of(kubectl, name).get("model"))
    assert report == {
        "architecture": "Gemma3ForCausalLM",
        "quantization": quantization,
        "kvCacheDtype": "FP8E4M3",
        "tensorParallelSize": 2,
    }
    assert [complete(kubectl, name, prompt) for prompt in PROMPTS] == tokens_of_one_rank(name)


def test_forty_requests_make_two_replicas_ready_and_silence_makes_one(kubectl: Kubectl) -> None:
    serve(kubectl, "AWQ")
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            assert len(complete(kubectl, "awq", PROMPTS[0])) == MAX_TOKENS

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        clients = [pool.submit(keep_asking) for _ in range(40)]
        try:
            wait_until(
                "two replicas ready",
                lambda: status_of(kubectl, "awq").get("readyReplicas") == 2,
                timeout_seconds=400,
                on_timeout=lambda: show_services(kubectl),
            )
        finally:
            stop.set()
        for client in clients:
            client.result()
    wait_until(
        "one replica again",
        lambda: status_of(kubectl, "awq").get("desiredReplicas") == 1,
        timeout_seconds=120,
    )
    wait_ready(kubectl, "awq")


def test_a_format_that_is_not_the_checkpoints_is_named_in_the_status(kubectl: Kubectl) -> None:
    kubectl.apply(service("INT8", checkpoint="GPTQ"))

    def stalled() -> dict[str, Any] | None:
        found = condition({"status": status_of(kubectl, "int8")}, "Stalled")
        return found if found.get("status") == "True" else None

    found = wait_until("Stalled", stalled, timeout_seconds=120)
    assert found["reason"] == "QuantizationMismatch"
    assert (
        "--quantization int8 (engine.quantization) was given, but pvc://models/gemma-3-270m-gptq "
        "is quantized by gptq (config.json)" in found["message"]
    )
