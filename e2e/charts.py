"""helm as the end-to-end tests use it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stack
import yaml
from kube import Kubectl


def helm(target: stack.Target, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([target.helm, *arguments], capture_output=True, text=True, check=False)


def access(kubectl: Kubectl) -> list[str]:
    """Flags for the cluster and the namespace of kubectl."""
    flags = ["--namespace", kubectl.namespace]
    flags += ["--kubeconfig", kubectl.kubeconfig] if kubectl.kubeconfig else []
    return flags + (["--kube-context", kubectl.context] if kubectl.context else [])


def render(
    target: stack.Target,
    *values: str,
    files: Sequence[Path] = (),
    release: str = "pagoda",
    namespace: str = "pagoda-system",
) -> list[dict[str, Any]]:
    """The objects of a release."""
    sets = [part for value in values for part in ("--set-json", value)]
    sets += [part for file in files for part in ("--values", str(file))]
    done = helm(target, "template", release, str(stack.CHART), "--namespace", namespace, *sets)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]
