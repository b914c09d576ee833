"""Engines of two ranks on a CPU: they answer, and the status says why where they do not.

One service is shared by the tests of this file, in their order; each leaves it Ready.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import stack
from kube import Kubectl, condition, show_services, wait_ready, wait_until
from llmservices import manifest

NAMESPACE = "e2e-ranks"
NAME = "ranks"
# The brackets keep the shell itself from being found.
KILL_RANK_1 = """
for folder in /proc/[0-9]*; do
  if grep -q 'pagoda_runtime.engine[.]rank' $folder/cmdline; then kill -9 ${folder#/proc/}; fi
done
"""
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def service(name: str = NAME, tensor_parallel_size: int = 2) -> dict[str, Any]:
    engine = {
        "tensorParallelSize": tensor_parallel_size,
        "kvCacheDtype": "FP8",
        "maxModelLen": 512,
        "extraArgs": ["--num-threads=2"],
    }
    spec = {
        "model": {"uri": "pvc://models/gemma-3-270m"},
        "engine": engine,
        "resources": {"gpu": {"count": 0}, "cpu": "400m", "memory": "6Gi"},
    }
    return manifest(spec, name=name)


@pytest.fixture(scope="module")
def kubectl(target: stack.Target, images: dict[str, str]) -> Iterator[Kubectl]:
    """A namespace in which an engine of two ranks with a KV cache in 8 bits is Ready."""
    stack.install_operator(target, images)
    with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
        stack.ensure_model_volume(target, kubectl, images)
        kubectl.apply(service())
        wait_ready(kubectl, NAME)
        yield kubectl


def wait_for_cause(kubectl: Kubectl, name: str, reason: str) -> str:
    """The message of Stalled once its reason is this one."""

    def found() -> str | None:
        entry = condition(kubectl.get("llmservice", name) or {}, "Stalled")
        is_it = (entry.get("status"), entry.get("reason")) == ("True", reason)
        return str(entry["message"]) if is_it else None

    return wait_until(
        reason,
        found,
        timeout_seconds=120,
        interval_seconds=0.1,
        on_timeout=lambda: show_services(kubectl),
    )


def answer(kubectl: Kubectl) -> str:
    address = kubectl.json("get", "service", NAME)["spec"]["clusterIP"]
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": NAME, "messages": [question], "max_tokens": 16, "temperature": 0}
    response = httpx.post(f"http://{address}/v1/chat/completions", json=body, timeout=60)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def test_two_ranks_with_keys_and_values_in_8_bits_answer(kubectl: Kubectl) -> None:
    assert "Paris" in answer(kubectl)


def test_a_killed_rank_is_named_in_the_status_and_the_engine_comes_back(kubectl: Kubectl) -> None:
    (pod,) = kubectl.items("pods", "-l", f"pagoda.dev/service={NAME}")
    kubectl.run("exec", pod["metadata"]["name"], "--", "sh", "-c", KILL_RANK_1)
    message = wait_for_cause(kubectl, NAME, "RankDied")
    assert "Rank 1 of 2" in message
    assert "SIGKILL" in message
    wait_ready(kubectl, NAME, timeout_seconds=120)
    assert "Paris" in answer(kubectl)


def test_ranks_that_do_not_divide_the_heads_are_refused_in_the_status(kubectl: Kubectl) -> None:
    kubectl.apply(service("three", tensor_parallel_size=3))
    message = wait_for_cause(kubectl, "three", "InvalidFlags")
    assert "engine.tensorParallelSize) is 3; it must divide the model's 4 attention" in message
    kubectl.run("delete", "llmservice", "three")
