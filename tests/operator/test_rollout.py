"""How changed pods replace others, and which image they keep."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pagoda_operator.names import LABEL_REVISION, Manifest
from pagoda_operator.render import render_deployment, revision_of
from pagoda_operator.rollout import ROOM_SECONDS, Rollout, _parse_quantity, choose_rollout
from pagoda_operator.testing import make_pod, make_service, set_deployment_status

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
IMAGE = "engine:1"
NO_GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
GATED = {"reason": "SchedulingGated", "message": "Scheduling is blocked"}
QUOTA = 'pods "x" is forbidden: exceeded quota: team'


def render(spec: dict[str, Any] | None = None, image: str = IMAGE, **more: Any) -> Manifest:
    """The live Deployment of a rollout in which one of two pods is new."""
    found = render_deployment(make_service(spec), engine_image=image, **more)
    set_deployment_status(found, ready=1, updated=1, total=2)
    return found


def pod(kind: str, deployment: Manifest, **spec: Any) -> Manifest:
    """A pod of the old or the new template of a Deployment."""
    found = make_pod(revision_of(deployment), name=kind, ready=kind == "old")
    found["metadata"]["labels"]["pod-template-hash"] = kind
    template = deployment["spec"]["template"]["spec"]
    found["spec"] = {"containers": template["containers"], "nodeName": "a", **spec}
    if kind == "old":
        found["metadata"]["labels"][LABEL_REVISION] = "older"
    return found


def waiting(
    deployment: Manifest, seconds: float = ROOM_SECONDS, said: str = NO_GPU, **spec: Any
) -> Manifest:
    """A new pod for which the scheduler has found no node for so long."""
    found = pod("new", deployment, **spec)
    del found["spec"]["nodeName"]
    since = (NOW - timedelta(seconds=seconds)).isoformat()
    condition = {"type": "PodScheduled", "status": "False", "message": said}
    found["status"] = {
        "phase": "Pending",
        "conditions": [{**condition, "lastTransitionTime": since}],
    }
    return found


def choose(
    deployment: Manifest | None,
    *pods: Manifest,
    spec: dict[str, Any] | None = None,
    events: tuple[Manifest, ...] = (),
    image: str = IMAGE,
) -> Rollout:
    return choose_rollout(
        make_service(spec), deployment, pods, events, default_image=image, now=NOW
    )


def chosen(rollout: Rollout) -> tuple[str, str]:
    return rollout.strategy, rollout.reason


def test_auto_begins_with_a_surge_on_gpus_and_cpus() -> None:
    for spec in ({}, {"resources": {"gpu": {"count": 0}}}):
        assert chosen(choose(None, spec=spec)) == ("Surge", "Preferred")
        assert chosen(choose(render(spec), spec=spec)) == ("Surge", "Preferred")


@pytest.mark.parametrize("strategy", ["Surge", "InPlace", "Recreate"])
def test_a_strategy_of_the_spec_is_kept_whatever_the_scheduler_says(strategy: str) -> None:
    spec = {"rollout": {"strategy": strategy}}
    live = render(spec)
    found = choose(live, pod("old", live), waiting(live, 9999), spec=spec)
    assert chosen(found) == (strategy, "AsSpecified")


def test_a_new_pod_without_room_waits_for_it_and_then_takes_that_of_an_old_one() -> None:
    live = render()
    early = choose(live, pod("old", live), waiting(live, 20))
    assert (chosen(early), early.next_look_seconds) == (("Surge", "WaitingForRoom"), 100)
    late = choose(live, pod("old", live), waiting(live, ROOM_SECONDS))
    assert (chosen(late), late.next_look_seconds) == (("InPlace", "NoRoom"), None)


def test_a_clock_that_runs_behind_makes_no_one_wait_longer() -> None:
    live = render()
    found = choose(live, pod("old", live), waiting(live, -3600))
    assert found.next_look_seconds == ROOM_SECONDS


def test_where_nothing_serves_nothing_is_waited_for() -> None:
    live = render()
    set_deployment_status(live, ready=0, updated=1, total=2)
    assert chosen(choose(live, pod("old", live), waiting(live, 0))) == ("InPlace", "NoRoom")


def test_a_rollout_in_place_stays_one_until_no_old_pod_is_left() -> None:
    live = render(strategy="InPlace")
    assert chosen(choose(live, pod("old", live))) == ("InPlace", "NoRoom")
    # Before the Deployment's controller has seen it, and for another spec.
    live["metadata"]["generation"] = 2
    set_deployment_status(live, ready=1, updated=2, total=2)
    live["metadata"]["generation"] = 3
    assert chosen(choose(live, pod("old", live))) == ("InPlace", "NoRoom")
    other = choose(live, pod("old", live), spec={"engine": {"maxNumSeqs": 7}})
    assert chosen(other) == ("Surge", "Preferred")
    set_deployment_status(live, ready=1, updated=2, total=2)
    assert chosen(choose(live, pod("new", live))) == ("Surge", "Preferred")


@pytest.mark.parametrize(
    "new",
    [
        {"nodeSelector": {"pool": "b"}},
        {"tolerations": []},
        {"containers": [{"resources": {"requests": {"nvidia.com/gpu": "2"}}}]},
    ],
    ids=str,
)
def test_what_serves_is_not_given_up_for_a_pod_that_may_fit_nowhere(new: dict[str, Any]) -> None:
    live = render()
    old = pod("old", live, tolerations=[{"operator": "Exists"}])
    found = choose(live, old, waiting(live, **{"tolerations": [{"operator": "Exists"}], **new}))
    assert chosen(found) == ("Surge", "NoRoomInPlace")
    # The rollout fails by its deadline.
    assert found.next_look_seconds is None


def test_a_pod_without_a_node_holds_no_room() -> None:
    live = render()
    held = pod("old", live)
    del held["spec"]["nodeName"]
    assert chosen(choose(live, held, waiting(live))) == ("Surge", "NoRoomInPlace")


@pytest.mark.parametrize(
    "said", ["1 node(s) didn't match Pod's node affinity/selector.", "1 node(s) had taints"]
)
def test_a_pod_that_no_end_of_another_helps_is_no_matter_of_room(said: str) -> None:
    live = render()
    found = choose(live, pod("old", live), waiting(live, 9999, said))
    assert chosen(found) == ("Surge", "Preferred")


def test_a_pod_beside_others_of_its_own_template_is_a_matter_of_scaling() -> None:
    live = render()
    set_deployment_status(live, ready=1, updated=2, total=2)
    assert chosen(choose(live, pod("new", live), waiting(live))) == ("Surge", "Preferred")


def test_a_restart_by_kubectl_finds_its_room_too() -> None:
    live = render()
    old = pod("old", live)
    old["metadata"]["labels"][LABEL_REVISION] = revision_of(live)
    assert chosen(choose(live, old, waiting(live))) == ("InPlace", "NoRoom")


def test_the_quota_of_a_queue_is_room_too() -> None:
    live = render()
    new = waiting(live, schedulingGates=[{"name": "kueue.x-k8s.io/admission"}])
    new["status"]["conditions"][0] |= GATED
    # The API server gives this condition no time.
    new["status"]["conditions"][0]["lastTransitionTime"] = None
    new["metadata"]["creationTimestamp"] = (NOW - timedelta(seconds=ROOM_SECONDS)).isoformat()
    assert chosen(choose(live, pod("old", live), new)) == ("InPlace", "NoRoom")
    new["spec"]["schedulingGates"] = [{"name": "team.dev/approval"}]
    assert chosen(choose(live, pod("old", live), new)) == ("Surge", "Preferred")


def test_the_quota_of_a_namespace_is_room_too() -> None:
    live = render()
    set_deployment_status(live, ready=1, updated=0, total=1)
    since = (NOW - timedelta(seconds=ROOM_SECONDS)).isoformat()
    failure = {"type": "ReplicaFailure", "status": "True", "message": QUOTA}
    live["status"]["conditions"] = [{**failure, "lastTransitionTime": since}]
    assert chosen(choose(live, pod("old", live))) == ("InPlace", "NoRoom")


def test_a_volume_that_another_node_has_is_room_too() -> None:
    live = render()
    new = pod("new", live)
    new["metadata"]["uid"] = "u"
    since = (NOW - timedelta(seconds=ROOM_SECONDS)).isoformat()
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": since}
    new["status"] = {"phase": "Pending", "conditions": [scheduled]}
    event = {
        "involvedObject": {"uid": "u"},
        "reason": "FailedAttachVolume",
        "message": 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) old',
    }
    assert chosen(choose(live, pod("old", live), new)) == ("Surge", "Preferred")
    assert chosen(choose(live, pod("old", live), new, events=(event,))) == ("InPlace", "NoRoom")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1500m", 1.5), ("2Gi", 2 * 1024**3), ("1e3", 1000), ("3E", 3 * 1000**6), ("0.5", 0.5)],
)
def test_quantities_are_compared_as_numbers(text: str, value: float) -> None:
    assert _parse_quantity(text) == value


def test_engines_keep_their_image_until_something_else_changes_them() -> None:
    live = render(image="engine:0")
    kept = choose(live)
    assert (kept.image, kept.newer_image) == ("engine:0", IMAGE)
    assert kept.fields()["newerImage"] == IMAGE
    changed = choose(live, spec={"engine": {"maxNumSeqs": 7}})
    assert (changed.image, changed.newer_image) == (IMAGE, None)
    assert choose(None).image == IMAGE


def test_engines_that_follow_get_the_operators_image_at_once() -> None:
    assert choose(render(image="engine:0"), spec={"engine": {"imagePolicy": "Follow"}}).image == (
        IMAGE
    )


def test_an_image_of_the_spec_that_is_taken_back_is_not_kept() -> None:
    mine = {"engine": {"image": "mine:2"}}
    live = render(mine, image="engine:0")
    assert choose(live, spec=mine).newer_image is None
    assert choose(live).image == IMAGE


def test_an_image_that_somebody_else_set_is_not_kept() -> None:
    live = render(image="engine:0")
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "evil:1"
    assert choose(live).image == "engine:0"


def test_the_image_of_an_operator_that_did_not_note_it_is_kept() -> None:
    live = render(image="engine:0")
    del live["metadata"]["annotations"]
    sidecar = {"name": "sidecar", "image": "sidecar:1"}
    live["spec"]["template"]["spec"]["containers"].insert(0, sidecar)
    assert choose(live).image == "engine:0"
