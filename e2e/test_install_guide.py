"""docs/guides/install.md: every command of it is run as it stands, or marked as one that is not.

Its variables have other values here: the local registry, and a service of the model that the tests
have. Helm installs, is asked and uninstalls; kustomize installs what then serves the same service.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import guides
import pytest
import stack
from kube import Kubectl
from llmservices import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

BLOCKS = list(guides.blocks(stack.ROOT / "docs" / "guides" / "install.md"))
QUESTION = "kubectl create --raw"
NAMESPACE = "e2e-guide"
SPEC = {
    "model": {"uri": "pvc://models/gemma-3-270m"},
    "engine": {"maxModelLen": 512, "maxNumSeqs": 4, "extraArgs": ["--num-threads=1"]},
    "resources": {"gpu": {"count": 0}, "cpu": "300m", "memory": "3Gi"},
}
NAME = "chat"


class Shell:
    """bash with the guide's variables, and kubectl and helm on its PATH."""

    def __init__(self, target: stack.Target, kubectl: Kubectl, folder: Path) -> None:
        config = kubectl.run("config", "view", "--raw", "--minify")
        (folder / "kubeconfig").write_text(config)
        (folder / "service.yaml").write_text(json.dumps(manifest(SPEC, name=NAME)))
        programs = f"{Path(kubectl.binary).parent}:{Path(target.helm).parent}"
        self._variables = {
            "CONTEXT": kubectl.run("config", "current-context").strip(),
            "NAMESPACE": kubectl.namespace,
            "REGISTRY": "127.0.0.1:5000",
            # Another one for each run: a node keeps the image of a tag that it has.
            "TAG": f"guide-{uuid.uuid4().hex[:8]}",
            "HF_TOKEN": "hf_none",
            "NAME": NAME,
            "SERVICE": str(folder / "service.yaml"),
        }
        self._environment = dict(
            os.environ,
            **self._variables,
            KUBECONFIG=str(folder / "kubeconfig"),
            PATH=f"{programs}:{os.environ['PATH']}",
        )

    def run(self, heading: str, *, only: str = "") -> str:
        """Run the blocks of a heading, or of them the commands from `only` on."""
        text = "".join(b.text for b in BLOCKS if b.heading == heading and b.is_run)
        assert text
        text = text[text.index(only) :]
        lines = [line for line in text.splitlines() if not line.startswith("export ")]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
            cwd=stack.ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def shell(target: stack.Target, images: dict[str, str], tmp_path: Path) -> Iterator[Shell]:
    """In a namespace with the model's claim; the operator of before is back afterwards."""
    if not target.is_local:
        pytest.skip("the guide is tried with the local registry")
    stack.install_operator(target, images)
    try:
        with stack.restricted_namespace(target.kubectl, NAMESPACE) as kubectl:
            stack.ensure_model_volume(target, kubectl, images)
            yield Shell(target, kubectl, tmp_path)
    finally:
        stack.install_operator(target, images)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.heading or "variables")
def test_a_block_is_valid_bash(block: guides.Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_is_served_in_six_commands() -> None:
    (block,) = (block for block in BLOCKS if block.heading == "With Helm")
    commands = [
        line for line in block.text.splitlines() if line.startswith(("make", "helm", "kub"))
    ]
    assert len(commands) == 6


def test_the_guides_commands_install_serve_and_uninstall_with_and_without_helm(
    shell: Shell,
) -> None:
    shell.run("")
    assert is_answer(shell.run("With Helm"))
    shell.run("Uninstall")
    assert is_answer(shell.run("With Helm", only=QUESTION))
    shell.run("Without Helm")


def is_answer(said: str) -> bool:
    """Whether the last line is a chat completion with some text."""
    (choice,) = json.loads(said.splitlines()[-1])["choices"]
    return bool(choice["message"]["content"])
