"""What the status says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pagoda_operator.cause import Cause
from pagoda_operator.names import Manifest
from pagoda_operator.render import render_deployment
from pagoda_operator.status import MAX_MESSAGE, Counts, failed_status, is_seen, make_status, stamp
from pagoda_operator.testing import make_service, set_deployment_status

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
STALL = Cause("ModelNotFound", "the folder is not there", True)
LOADING = Cause("LoadingModel", "it loads", False)
REFUSED = Cause("Refused", "a policy says no", True)


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
    **more: Any,
) -> Manifest:
    service = make_service(spec, generation=4)
    deployment = render_deployment(service, engine_image="engine:1")
    set_deployment_status(deployment, ready=ready, updated=updated, total=total)
    made = make_status(
        service, deployment=deployment, cause=cause, desired_replicas=desired, **more
    )
    return stamp(*made, previous or {}, service.generation, now)


def messages(found: Manifest) -> dict[str, str]:
    return {entry["type"]: entry["message"] for entry in found["conditions"]}


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
    made = make_status(service, deployment=deployment, cause=None, desired_replicas=1)
    found = stamp(*made, {}, 1, NOW)
    assert conditions(found)["Ready"] == "False Progressing"


def test_a_service_that_finds_room_for_one_of_three_says_so_and_is_ready() -> None:
    spec = {"autoscaling": {"maxReplicas": 4}}
    no_room = Cause("InsufficientGPU", "No node has a GPU.", False)
    found = status(spec=spec, ready=1, updated=3, total=3, cause=no_room, desired=3)
    assert conditions(found) == {
        "Ready": "True InsufficientGPU",
        "Available": "True ReplicasAvailable",
        "Reconciling": "False Settled",
        "Stalled": "False Settled",
    }
    assert messages(found)["Ready"] == "1 of 3 replicas serve. No node has a GPU."
    assert "Nothing is left" not in messages(found)["Reconciling"]
    assert messages(found)["Available"] == "Requests are answered by 1 of 3 replicas."


def test_a_service_whose_children_are_not_what_it_asks_for_is_never_ready() -> None:
    hanging = Cause("WaitingForDeletion", "Deployment chat-engine is being deleted", False)
    assert conditions(status(ready=1, cause=hanging, is_applied=False)) == {
        "Ready": "False WaitingForDeletion",
        "Available": "True ReplicasAvailable",
        "Reconciling": "True WaitingForDeletion",
        "Stalled": "False Progressing",
    }


def test_a_refused_write_does_not_hide_that_the_pods_are_gone() -> None:
    before = status(ready=1)
    found = status(ready=0, total=0, updated=0, cause=REFUSED, is_applied=False, previous=before)
    assert conditions(found)["Available"] == "False NoReadyReplica"
    assert conditions(found)["Stalled"] == "True Refused"
    assert found["summary"] == "0/1"


def test_engines_behind_a_service_that_is_not_ours_are_not_available() -> None:
    conflict = Cause("NameConflict", "Service chat exists", True)
    found = status(ready=1, cause=conflict, is_applied=False, is_reachable=False)
    assert conditions(found)["Available"] == "False NoService"


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


def test_a_spec_that_is_not_understood_keeps_the_url_and_counts_the_pods_anew() -> None:
    before = status(ready=1)
    invalid = Cause("InvalidSpec", "spec.x: unknown", True)
    found = stamp(*failed_status(invalid, Counts.of(None), before), before, 5, NOW)
    assert conditions(found)["Stalled"] == "True InvalidSpec"
    assert conditions(found)["Available"] == "False NoReadyReplica"
    assert (found["observedGeneration"], found["summary"]) == (5, "0/1")
    assert found["url"] == before["url"]


def test_pods_that_cannot_be_read_are_not_said_to_answer() -> None:
    cause = Cause("ApiServerError", "GET pods: 500", False)
    before = status(ready=1)
    found = stamp(*failed_status(cause, None, before), before, 5, NOW)
    assert conditions(found)["Available"] == "Unknown ApiServerError"
    assert conditions(found)["Reconciling"] == "True ApiServerError"


def test_a_message_is_one_line_of_bounded_length() -> None:
    cause = Cause("Refused", "a policy\n says no " + "x" * MAX_MESSAGE, True)
    message = messages(status(cause=cause, is_applied=False))["Stalled"]
    assert message.startswith("a policy says no x")
    assert (len(message), message[-1]) == (MAX_MESSAGE, "…")


def test_the_default_of_the_crd_is_no_status_of_an_operator() -> None:
    assert not is_seen({})
    assert not is_seen({"observedGeneration": -1})
    assert is_seen(status())
