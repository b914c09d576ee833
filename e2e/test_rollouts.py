"""How changed engines replace others.

Deployment, scheduler and quotas are real; what a kubelet says of pods is the test's.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stack
from fake_node import RUNNING, Engines
from kube import Kubectl, wait_until
from operator_process import OperatorProcess

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("team_operator"),
]

EDIT = {"engine": {"maxNumSeqs": 7}}
LONG_AGO = "2026-01-01T00:00:00Z"
AT_ONCE = ("--force", "--grace-period=0", "--ignore-not-found")


@pytest.fixture(scope="module")
def node(target: stack.Target) -> Iterator[str]:
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    target.kubectl.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    target.kubectl.run("delete", "node", name)


def deployment(engines: Engines) -> dict[str, Any]:
    return engines.kubectl.json("get", f"deployment/{engines.name}-engine")


def rollout(engines: Engines) -> tuple[str, str]:
    found = engines.status().get("status", {}).get("rollout", {})
    return found.get("strategy", ""), found.get("reason", "")


def wait_for_rollout(engines: Engines, strategy: str, reason: str) -> None:
    wait_until(
        f"{strategy} for {reason}",
        lambda: rollout(engines) == (strategy, reason),
        on_timeout=lambda: json.dumps(engines.status().get("status"), indent=1),
    )


def pods_without_node(engines: Engines) -> list[str]:
    pods = engines.kubectl.items("pods", "-l", f"pagoda.dev/service={engines.name}")
    return [pod["metadata"]["name"] for pod in pods if "nodeName" not in pod["spec"]]


def let_it_have_waited(engines: Engines) -> None:
    """As if the scheduler had looked for a node for months."""
    (pod,) = wait_until("a pod without room", lambda: pods_without_node(engines))

    def said() -> list[dict[str, Any]]:
        conditions = engines.kubectl.json("get", f"pod/{pod}")["status"].get("conditions", [])
        return [it for it in conditions if "Insufficient" in it.get("message", "")]

    (condition,) = wait_until("the scheduler's word", said)
    patch = {"status": {"conditions": [{**condition, "lastTransitionTime": LONG_AGO}]}}
    engines.patch(f"pod/{pod}", patch, "--subresource=status")


def end_rollout(engines: Engines, num_pods: int) -> list[str]:
    """Play the kubelet until the service is ready and old pods are gone.

    Returns how many engines were ready at each look.
    """
    seen: list[str] = []

    def is_done() -> bool:
        pods = engines.kubectl.items("pods", "-l", f"pagoda.dev/service={engines.name}")
        for pod in pods:
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                engines.kubectl.run(
                    "delete", "pod", name, "--force", "--grace-period=0", "--ignore-not-found"
                )
            elif "nodeName" in pod["spec"] and pod["status"]["phase"] == "Pending":
                engines.play_kubelet(name, RUNNING, ready=True)
        status = engines.status().get("status", {})
        seen.append(status.get("summary", ""))
        ready = {it["type"]: it["status"] for it in status.get("conditions", [])}.get("Ready")
        is_whole = status.get("replicas") == status.get("updatedReplicas") == num_pods
        # Replicas are counted without the pods that end: an old one may still be there.
        return ready == "True" and is_whole and len(pods) == num_pods

    wait_until(
        "the new pods alone",
        is_done,
        on_timeout=lambda: json.dumps(engines.status().get("status"), indent=1),
    )
    return seen


def test_where_there_is_room_a_new_engine_is_ready_before_the_old_one_ends(
    team: Kubectl, node: str
) -> None:
    engines = Engines(team, node, room=2)
    engines.serve()
    (old,) = engines.bound_pods()
    engines.apply(**EDIT)
    wait_until("both", lambda: len(engines.bound_pods()) == 2)
    assert rollout(engines) == ("Surge", "Preferred")
    assert "0/1" not in end_rollout(engines, 1)
    assert old not in engines.bound_pods()


def test_where_there_is_none_old_engines_end_first_and_one_at_a_time(
    team: Kubectl, node: str
) -> None:
    engines = Engines(team, node, room=2)
    engines.serve(replicas=2)
    engines.apply(replicas=2, **EDIT)
    wait_for_rollout(engines, "Surge", "WaitingForRoom")
    engines.wait_for("Reconciling", "True", "NoRoomToSurge", "status.rollout")
    assert len(engines.bound_pods()) == 2
    let_it_have_waited(engines)
    wait_for_rollout(engines, "InPlace", "NoRoom")
    # Once for the whole rollout: the second engine does not wait again.
    assert "0/2" not in end_rollout(engines, 2)
    wait_for_rollout(engines, "Surge", "Preferred")
    rolling = deployment(engines)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


def test_engines_that_do_not_serve_make_room_at_once(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=1)
    engines.apply()
    (old,) = wait_until("a pod with a node", engines.bound_pods)
    engines.apply(**EDIT)

    def is_ending() -> bool:
        found = team.get("pod", old)
        return found is None or "deletionTimestamp" in found["metadata"]

    wait_until("the end of the old one", is_ending)
    end_rollout(engines, 1)


def test_a_rollout_that_cannot_become_ready_leaves_the_old_engines_serving(
    team: Kubectl, node: str
) -> None:
    engines = Engines(team, node, room=1)
    soon = {"rollout": {"progressDeadlineSeconds": 10}}
    engines.serve(**soon)
    (old,) = engines.bound_pods()
    before = engines.status()["status"]["revision"]
    engines.apply(engine={"tensorParallelSize": 2}, **soon)
    let_it_have_waited(engines)
    wait_for_rollout(engines, "Surge", "NoRoomInPlace")
    after = engines.status()["status"]["revision"]
    parts = (f"revision {after} did not", "within 10 s", f"engines of revision {before} serve on")
    engines.wait_for("Stalled", "True", "ProgressDeadlineExceeded", *parts)
    engines.wait_for("Available", "True", "ReplicasAvailable")
    assert engines.bound_pods() == [old]
    engines.apply(**soon)
    engines.wait_for("Ready", "True", "Serving")
    assert engines.bound_pods() == [old]


def test_a_quota_that_old_engines_use_up_is_no_deadlock(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=2)
    quota = {"hard": {f"requests.{engines.gpu}": "1"}}
    meta = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": engines.name}}
    team.apply({**meta, "spec": quota})
    engines.serve()
    engines.apply(**EDIT)
    wait_for_rollout(engines, "Surge", "WaitingForRoom")
    found = deployment(engines)["status"]["conditions"]
    patched = [
        {**it, "lastTransitionTime": LONG_AGO} if it["type"] == "ReplicaFailure" else it
        for it in found
    ]
    patch = {"status": {"conditions": patched}}
    engines.patch(f"deployment/{engines.name}-engine", patch, "--subresource=status")
    wait_for_rollout(engines, "InPlace", "NoRoom")
    end_rollout(engines, 1)
    team.run("delete", "resourcequota", engines.name)


def test_a_paused_service_is_scaled_and_keeps_its_engines(team: Kubectl, node: str) -> None:
    engines = Engines(team, node, room=3)
    engines.serve()
    before = engines.status()["status"]["revision"]
    engines.apply(rollout={"paused": True}, replicas=2, **EDIT)
    words = f"engines of revision {before} serve on"
    engines.wait_for("Reconciling", "True", "RolloutPaused", words)
    wait_until("two", lambda: len(engines.bound_pods()) == 2)
    for pod in team.items("pods", "-l", f"pagoda.dev/service={engines.name}"):
        assert pod["metadata"]["labels"]["pagoda.dev/revision"] == before
    engines.apply(rollout={"paused": False}, replicas=2, **EDIT)
    end_rollout(engines, 2)


def test_a_new_image_of_the_operator_rolls_only_engines_that_ask_for_it(
    team: Kubectl, node: str, team_operator: OperatorProcess, tmp_path: Path
) -> None:
    keeping = Engines(team, node, room=1)
    keeping.serve()
    (old,) = keeping.bound_pods()
    following = Engines(team, node, room=1)
    following.apply(engine={"imagePolicy": "Follow"})
    name = f"{following.name}-engine"
    wait_until("its Deployment", lambda: team.get("deployment", name))
    assert team_operator.stop() == 0
    newer = OperatorProcess(team, tmp_path / "newer.log", engine_image="pagoda.invalid/engine:2")
    newer.start()
    try:

        def image_of(engines: Engines) -> str:
            (container,) = deployment(engines)["spec"]["template"]["spec"]["containers"]
            return str(container["image"])

        def newer_image() -> str | None:
            found = keeping.status()["status"].get("rollout", {}).get("newerImage")
            return str(found) if found else None

        assert wait_until("it is said", newer_image).endswith("engine:2")
        wait_until("the follower's", lambda: image_of(following).endswith(":2"))
        assert image_of(keeping).endswith(":1")
        assert keeping.bound_pods() == [old]
        keeping.apply(**EDIT)
        wait_until("the edit's", lambda: image_of(keeping).endswith(":2"))
        # The status is written after the Deployment.
        wait_until("no newer image", lambda: newer_image() is None)
    finally:
        newer.stop()
        team_operator.start()
