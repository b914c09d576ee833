"""What the status says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.causes import Cause
from pagoda_operator.names import Manifest
from pagoda_operator.render import render_deployment
from pagoda_operator.status import failed_status, make_status
from pagoda_operator.testing import make_service, set_deployment_status

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
STALL = Cause("ModelNotFound", "the folder is not there", True)
LOADING = Cause("LoadingModel", "it loads", False)


def status(
    *,
    spec: dict[str, Any] | None = None,
    ready: int = 0,
    updated: int = 1,
    total: int = 1,
    cause: Cause | None = None,
    desired: int = 1,
    previous: Manifest | None = None,
    now: datetime = NOW,
) -> Manifest:
    service = make_service(spec, generation=4)
    deployment = render_deployment(service, engine_image="engine:1")
    set_deployment_status(deployment, ready=ready, updated=updated, total=total)
    return make_status(
        service,
        deployment=deployment,
        cause=cause,
        desired_replicas=desired,
        previous=previous or {},
        now=now,
    )


def conditions(found: Manifest) -> dict[str, str]:
    return {entry["type"]: f"{entry['status']} {entry['reason']}" for entry in found["conditions"]}


def test_a_service_whose_engines_serve_is_ready_and_settled() -> None:
    found = status(ready=1)
    assert conditions(found) == {
        "Ready": "True Serving",
        "Available": "True ReplicasAvailable",
        "Reconciling": "False Settled",
        "Stalled": "False Settled",
    }
    assert (found["observedGeneration"], found["summary"]) == (4, "1/1")
    assert found["url"] == "http://chat.team.svc/v1"


def test_a_loading_engine_is_work_under_way() -> None:
    assert conditions(status(cause=LOADING)) == {
        "Ready": "False LoadingModel",
        "Available": "False NoReadyReplica",
        "Reconciling": "True LoadingModel",
        "Stalled": "False Progressing",
    }


def test_a_rollout_is_not_ready_until_the_old_pods_are_gone_but_answers() -> None:
    found = conditions(status(ready=1, updated=1, total=2, cause=LOADING))
    assert found["Ready"] == "False LoadingModel"
    assert found["Available"] == "True ReplicasAvailable"


def test_a_stalled_rollout_says_why_and_still_answers() -> None:
    found = status(ready=1, updated=1, total=2, cause=STALL)
    assert conditions(found) == {
        "Ready": "False ModelNotFound",
        "Available": "True ReplicasAvailable",
        "Reconciling": "False Stalled",
        "Stalled": "True ModelNotFound",
    }
    assert {e["message"] for e in found["conditions"] if e["type"] == "Stalled"} == {STALL.message}


def test_counts_of_an_earlier_spec_of_the_deployment_are_not_believed() -> None:
    service = make_service()
    deployment = render_deployment(service, engine_image="engine:1")
    set_deployment_status(deployment, ready=1, updated=1, total=1)
    deployment["metadata"]["generation"] = 2
    found = make_status(
        service, deployment=deployment, cause=None, desired_replicas=1, previous={}, now=NOW
    )
    assert conditions(found)["Ready"] == "False Progressing"


def test_scaling_up_leaves_a_ready_service_ready() -> None:
    spec = {"autoscaling": {"maxReplicas": 4}}
    found = conditions(status(spec=spec, ready=1, updated=2, total=2, cause=LOADING, desired=2))
    assert found["Ready"] == "True Serving"


def test_a_suspended_service_is_ready_once_its_pods_are_gone() -> None:
    spec = {"suspend": True}
    stopping = conditions(status(spec=spec, ready=1, desired=0))
    assert stopping["Ready"] == "False ScalingDown"
    found = conditions(status(spec=spec, updated=0, total=0, desired=0))
    assert found["Ready"] == "True Suspended"
    assert found["Available"] == "False Suspended"


def test_no_replicas_asked_for_is_ready_too() -> None:
    found = conditions(status(spec={"replicas": 0}, updated=0, total=0, desired=0))
    assert found["Ready"] == "True ScaledToZero"


def test_the_same_world_gives_the_same_status_at_any_time() -> None:
    first = status(cause=LOADING)
    later = status(cause=LOADING, previous=first, now=NOW + timedelta(hours=1))
    assert later == first


def test_the_transition_time_moves_only_with_the_status_of_its_condition() -> None:
    first = status(cause=LOADING)
    later = status(cause=STALL, previous=first, now=NOW + timedelta(hours=1))
    times = {entry["type"]: entry["lastTransitionTime"] for entry in later["conditions"]}
    assert times["Ready"] == "2026-11-21T12:00:00Z"
    assert times["Stalled"] == "2026-11-21T13:00:00Z"


def test_a_failure_keeps_what_is_known_of_the_pods() -> None:
    before = status(ready=1)
    found = failed_status(5, "NameConflict", "Service chat exists", previous=before, now=NOW)
    assert conditions(found)["Stalled"] == "True NameConflict"
    assert conditions(found)["Available"] == "True ReplicasAvailable"
    assert (found["observedGeneration"], found["summary"]) == (5, "1/1")


causes = st.sampled_from([None, STALL, LOADING])


@given(
    replicas=st.integers(0, 3),
    suspend=st.booleans(),
    ready=st.integers(0, 3),
    updated=st.integers(0, 3),
    extra=st.integers(0, 2),
    cause=causes,
)
def test_every_status_can_be_read_by_kstatus(
    replicas: int, suspend: bool, ready: int, updated: int, extra: int, cause: Cause | None
) -> None:
    """Ready, in progress or failed: never two of them, never none."""
    spec = {"replicas": replicas, "suspend": suspend}
    total = max(updated + extra, ready)
    found = status(
        spec=spec, ready=min(ready, total), updated=min(updated, total), total=total, cause=cause
    )
    by_type = {entry["type"]: entry["status"] == "True" for entry in found["conditions"]}
    assert [by_type["Ready"], by_type["Reconciling"], by_type["Stalled"]].count(True) == 1
    assert all(entry["reason"] and entry["message"] for entry in found["conditions"])
