"""kubectl as the demo and the end-to-end tests use it, and waiting with a deadline."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class KubectlError(Exception):
    """kubectl ended with an error; the message is its own."""


class TimedOut(Exception):
    """Something did not come true in time; the message says what, and how things stood."""


@dataclass(frozen=True, slots=True)
class Kubectl:
    """One kubectl binary against one cluster, with `namespace` as the default namespace."""

    binary: str
    kubeconfig: str | None = None
    context: str | None = None
    namespace: str = "default"

    def in_namespace(self, namespace: str) -> Kubectl:
        return Kubectl(self.binary, self.kubeconfig, self.context, namespace)

    def command(self, *arguments: str) -> list[str]:
        """The whole command line, for a process that the caller runs."""
        flags = [f"--namespace={self.namespace}"]
        if self.kubeconfig:
            flags.append(f"--kubeconfig={self.kubeconfig}")
        if self.context:
            flags.append(f"--context={self.context}")
        return [self.binary, *flags, *arguments]

    def run(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 120) -> str:
        """Standard output of one kubectl command. Raises KubectlError with its words."""
        done = subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if done.returncode != 0:
            raise KubectlError(done.stderr.strip() or done.stdout.strip())
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "-o", "json"))

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.json("get", *arguments)["items"]
        return items

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """One object, or None where there is none of that name."""
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def apply(self, manifest: dict[str, Any] | str) -> str:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        return self.run("apply", "-f", "-", stdin=text)


def wait_until(
    what: str,
    check: Callable[[], T | None],
    *,
    timeout_seconds: float = 50,
    interval_seconds: float = 0.25,
    on_timeout: Callable[[], str] = lambda: "",
) -> T:
    """The first true value of `check`. Raises TimedOut, with what `on_timeout` tells.

    By default it is less than the operator's resync, which would hide that no watch told.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        if value := check():
            return value
        if time.monotonic() > deadline:
            message = f"{what}: not within {timeout_seconds:.0f} s. {on_timeout()}"
            raise TimedOut(message)
        time.sleep(interval_seconds)


def condition(service: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an LLMService, or an empty one."""
    # A CRD that was made a moment ago has null.
    for entry in service.get("status", {}).get("conditions") or []:
        if entry["type"] == kind:
            return dict(entry)
    return {}


def is_ready(service: dict[str, Any] | None) -> bool:
    """Ready, and as seen at the generation that the object has now."""
    if service is None:
        return False
    observed = service.get("status", {}).get("observedGeneration")
    return observed == service["metadata"]["generation"] and (
        condition(service, "Ready").get("status") == "True"
    )


def show_services(kubectl: Kubectl) -> str:
    """How services and their pods stand, for a wait that was in vain."""
    return kubectl.run("get", "llms,pods,events", "-o", "wide")


def wait_ready(kubectl: Kubectl, name: str, timeout_seconds: float = 240) -> None:
    """Wait until the LLMService is Ready. Raises TimedOut."""
    wait_until(
        f"{name} Ready",
        lambda: is_ready(kubectl.get("llmservice", name)),
        timeout_seconds=timeout_seconds,
        on_timeout=lambda: show_services(kubectl),
    )
