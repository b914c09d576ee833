"""Models on a claim, read by a Job of the operator's image before there are engines."""

from __future__ import annotations

import json
from collections.abc import Iterator

import model
import pytest
import stack
from kube import Kubectl, condition, wait_until
from llmservices import manifest
from operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def team(
    target: stack.Target,
    images: dict[str, str],
    crds: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kubectl]:
    """A namespace with a claim, and an operator with the chart's rights that may make Jobs."""
    folder = tmp_path_factory.mktemp("operator")
    with stack.fresh_namespace(target.kubectl) as kubectl:
        stack.ensure_model_volume(target, kubectl, images)
        flags = ["--inspection-image", images["operator"]]
        log = folder / "operator.log"
        with OperatorProcess(kubectl, log, flags=flags).running() as operator:
            yield kubectl
            assert "Traceback" not in operator.log
            assert "is forbidden: User" not in operator.log


def apply(team: Kubectl, ranks: int) -> None:
    spec = {
        "model": {"uri": f"pvc://models/{model.model_folder().name}"},
        "engine": {"tensorParallelSize": ranks},
        "resources": {"gpu": {"count": 0}},
    }
    team.apply(manifest(spec, "claimed"))


def test_a_job_reads_a_claim_and_what_it_finds_decides(team: Kubectl) -> None:
    # Its four heads are not divided by three.
    apply(team, 3)

    def stalled() -> dict[str, object]:
        return condition(team.get("llmservice", "claimed") or {}, "Stalled")

    wait_until(
        "the verdict",
        lambda: stalled().get("reason") == "InvalidFlags",
        timeout_seconds=90,
        on_timeout=lambda: json.dumps(team.get("llmservice", "claimed"), indent=1),
    )
    assert "attention heads" in str(stalled()["message"])
    assert team.get("deployment", "claimed-engine") is None
    assert not team.items("jobs")
    apply(team, 1)
    wait_until(
        "the Deployment",
        lambda: team.get("deployment", "claimed-engine"),
        on_timeout=lambda: json.dumps(team.get("llmservice", "claimed"), indent=1),
    )
    wait_until(
        "the result",
        lambda: (team.get("llmservice", "claimed") or {})["status"].get("preflight"),
    )
    assert team.json("get", "llmservice", "claimed")["status"]["preflight"] == {"result": "Passed"}
