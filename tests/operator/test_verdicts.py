"""What kstatus and Argo CD make of every status that can be written."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lupa import lua51

from pagoda_operator.cause import Cause
from pagoda_operator.names import Manifest, find_condition
from pagoda_operator.render import render_deployment
from pagoda_operator.status import (
    Counts,
    autoscaling_condition,
    failed_status,
    make_status,
    stamp,
)
from pagoda_operator.testing import kstatus, make_manifest, make_service, set_deployment_status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HEALTH = Path(__file__).parents[2] / "charts/pagoda/argocd/health.lua"
CAUSES = (
    None,
    Cause("ModelNotFound", "no folder", True),
    Cause("LoadingModel", "it loads", False),
)
# What each of Argo CD's healths is in kstatus.
SAME = {
    "Healthy": "Current",
    "Suspended": "Current",
    "Progressing": "InProgress",
    "Degraded": "Failed",
}


DEPLOYMENT = render_deployment(make_service(), engine_image="engine:1")


class Argo:
    """Runs the script on objects as Argo CD does: as the global `obj`, in Lua 5.1."""

    def __init__(self) -> None:
        self._lua = lua51.LuaRuntime()
        self._health = self._lua.eval(f"function() {HEALTH.read_text()} end")

    def judge(self, manifest: Manifest) -> dict[str, str]:
        self._lua.globals().obj = self._lua.table_from(manifest, recursive=True)
        return dict(self._health())


ARGO = Argo()


def make(status: Manifest, generation: int = 4) -> Manifest:
    return make_manifest(generation=generation) | {"status": status}


@st.composite
def written_statuses(draw: st.DrawFn) -> Manifest:
    """All that `make_status` and `failed_status` can make of spec, pods and cause."""
    spec: dict[str, Any] = {"suspend": draw(st.booleans())}
    if draw(st.booleans()):
        most = draw(st.integers(1, 3))
        spec["autoscaling"] = {"minReplicas": draw(st.integers(0, most)), "maxReplicas": most}
        spec["autoscaling"]["driver"] = draw(st.sampled_from(["Operator", "External"]))
    else:
        spec["replicas"] = draw(st.integers(0, 3))
    service = make_service(spec, generation=4)
    deployment = copy.deepcopy(DEPLOYMENT)
    total = draw(st.integers(0, 4))
    ready, updated = draw(st.integers(0, total)), draw(st.integers(0, total))
    set_deployment_status(deployment, ready=ready, updated=updated, total=total)
    deployment["metadata"]["generation"] += draw(st.booleans())
    cause, is_applied = draw(st.sampled_from(CAUSES)), draw(st.booleans())
    if cause is not None and draw(st.booleans()):
        counts = draw(st.sampled_from([None, Counts.of(deployment)]))
        return stamp(*failed_status(cause, counts, {}), {}, 4, NOW)
    fields, conditions = make_status(
        service,
        deployment=draw(st.sampled_from([None, deployment])),
        cause=cause,
        desired_replicas=draw(st.integers(0, 3)),
        is_applied=is_applied,
        is_reachable=draw(st.booleans()),
    )
    blindness = draw(st.sampled_from([None, "nobody answers"]))
    owner = draw(st.sampled_from([None, "argocd"]))
    conditions |= autoscaling_condition(service.spec, replicas_owner=owner, blindness=blindness)
    return stamp(fields, conditions, {}, 4, NOW)


@settings(max_examples=200)
@given(status=written_statuses())
def test_every_status_has_one_meaning(status: Manifest) -> None:
    """In force, under way or failed: never two of them, never none, and the same for everybody."""
    is_true = {it["type"]: it["status"] == "True" for it in status["conditions"]}
    meanings = {"Ready": "Current", "Reconciling": "InProgress", "Stalled": "Failed"}
    (meaning,) = (name for kind, name in meanings.items() if is_true[kind])
    assert kstatus(make(status)) == meaning
    health = ARGO.judge(make(status))
    assert SAME[health["status"]] == meaning
    ready = find_condition(status, "Ready")
    assert (health["status"] == "Suspended") == (
        is_true["Ready"] and ready["reason"] == "Suspended"
    )
    assert health["message"] == f"{ready['reason']}: {ready['message']}"
    assert all(it["reason"] and it["message"] for it in status["conditions"])


@pytest.mark.parametrize("status", [None, {"observedGeneration": -1}, {"observedGeneration": 3}])
def test_what_no_operator_has_seen_is_in_progress(status: Manifest | None) -> None:
    manifest = make_manifest(generation=4) | ({} if status is None else {"status": status})
    assert ARGO.judge(manifest)["status"] == "Progressing"
    # The CRD gives an object without a status its default.
    if status is not None:
        assert kstatus(manifest) == "InProgress"


def test_a_status_of_an_earlier_spec_says_nothing() -> None:
    failed = stamp(*failed_status(Cause("InvalidSpec", "x", True), None, {}), {}, 4, NOW)
    assert kstatus(make(failed)) == "Failed"
    assert ARGO.judge(make(failed))["status"] == "Degraded"
    assert kstatus(make(failed, generation=5)) == "InProgress"
    assert ARGO.judge(make(failed, generation=5))["status"] == "Progressing"
