"""The main job, shown: an operator, an LLMService, an answer streamed through its Service.

Runs in .venv, after the model is converted and the local cluster is up (`phases.py demo`). With
CONTEXT and REGISTRY in the environment it uses that cluster and registry instead.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import model
import openai
import stack
from kube import Kubectl, KubectlError, TimedOut, condition, is_ready, show_services, wait_until

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "gemma-cpu.yaml"
SERVICE = "gemma"
QUESTION = "What is the capital of France?"

T = TypeVar("T")


def main() -> int:
    try:
        target = stack.Target.from_environment()
        images = timed("images", lambda: stack.build_images(target))
        kubectl = target.kubectl
        timed("operator", lambda: stack.install_operator(target, images))
        timed("model volume", lambda: stack.ensure_model_volume(target, kubectl, images))
        timed("engine", lambda: start_engine(kubectl))
        timed("answer", lambda: ask(target, kubectl))
    except (KubectlError, TimedOut, stack.StackError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    print("\n$ kubectl get llms")
    print(kubectl.run("get", "llms"))
    print_next_steps(target, kubectl)
    return 0


def timed(name: str, action: Callable[[], T]) -> T:
    print(f"== {name}", flush=True)
    started = time.monotonic()
    result = action()
    print(f"== {name}: {time.monotonic() - started:.1f} s", flush=True)
    return result


def start_engine(kubectl: Kubectl) -> None:
    """Apply the example and wait until the LLMService says Ready."""
    print(kubectl.run("apply", "-f", str(EXAMPLE)).strip())

    def settled() -> bool:
        service = kubectl.get("llmservice", SERVICE)
        stalled = condition(service or {}, "Stalled")
        if stalled.get("status") == "True":
            raise KubectlError(f"{stalled['reason']}: {stalled['message']}")
        return is_ready(service)

    wait_until(
        f"LLMService {SERVICE} Ready",
        settled,
        timeout_seconds=900,
        on_timeout=lambda: show_services(kubectl),
    )


def ask(target: stack.Target, kubectl: Kubectl) -> None:
    """Stream one chat answer with the openai client, through the Service."""
    with service_url(target, kubectl) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        print(f"> {QUESTION}\n<", end="", flush=True)
        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=48,
            temperature=0,
            stop=["\n\nUser:"],
            stream=True,
        )
        words = 0
        for chunk in stream:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                words += 1
                print(text, end="", flush=True)
        print(flush=True)
        if not words:
            raise stack.StackError("the stream ended without a single token.")


@contextlib.contextmanager
def service_url(target: stack.Target, kubectl: Kubectl) -> Iterator[str]:
    """An address of the Service: its cluster IP here, a port-forward to a cluster elsewhere."""
    if target.is_local:
        service = kubectl.get("service", SERVICE)
        assert service is not None
        yield f"http://{service['spec']['clusterIP']}"
        return
    forward = subprocess.Popen(
        kubectl.command("port-forward", f"service/{SERVICE}", ":80"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert forward.stdout is not None
        first = forward.stdout.readline()  # Forwarding from 127.0.0.1:PORT -> 8000
        if "127.0.0.1:" not in first:
            raise stack.StackError("kubectl port-forward gave no address.")
        yield "http://127.0.0.1:" + first.split("127.0.0.1:")[1].split(" ")[0]
    finally:
        forward.terminate()
        forward.wait()


def print_next_steps(target: stack.Target, kubectl: Kubectl) -> None:
    if target.is_local:
        print(f"  export KUBECONFIG={kubectl.kubeconfig} PATH={Path(kubectl.binary).parent}:$PATH")
        service = kubectl.get("service", SERVICE)
        url = f"http://{service['spec']['clusterIP']}" if service else ""
    else:
        print(f"  kubectl port-forward service/{SERVICE} 8080:80 &")
        url = "http://127.0.0.1:8080"
    print(f"  curl {url}/v1/chat/completions -H 'content-type: application/json' \\")
    print(
        f"""    -d '{{"model": "{model.MODEL_NAME}", "max_tokens": 32, "messages": """
        """[{"role": "user", "content": "What is the capital of Italy?"}]}'"""
    )
    print("  kubectl get llms -w")
    print(f"  kubectl describe llms {SERVICE}")
    print(
        "  make demo-down"
        if target.is_local
        else f"  kubectl delete -f {EXAMPLE.relative_to(ROOT)}"
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
