"""Why a pod does not serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from pagoda_operator.cause import Cause
from pagoda_operator.causes import events_of, failed_pods, find_cause, is_unstarted
from pagoda_operator.names import Manifest
from pagoda_operator.testing import make_pod, make_service

SPEC = make_service({"resources": {"gpu": {"count": 1}, "memory": "3Gi"}}).spec
DEADLINE = {"progressDeadlineSeconds": 600}
QUIET: Manifest = {"metadata": {"generation": 1}, "status": {"observedGeneration": 1}}


def cause_of(
    *pods: Manifest,
    deployment: Manifest = QUIET,
    events: Sequence[Manifest] = (),
) -> Cause | None:
    return find_cause(SPEC, deployment, pods, "rev", events)


def exited(code: int, message: str = "", **more: Any) -> dict[str, Any]:
    return {"exitCode": code, "message": message, **more}


def words(reason: str) -> str:
    return "a line of the log\n" + json.dumps({"reason": reason, "message": f"why {reason}"}) + "\n"


def test_last_words_are_the_reason_and_the_message() -> None:
    container = {"state": {"terminated": exited(1, words("CorruptWeights"))}}
    assert cause_of(make_pod("rev", container=container)) == Cause(
        "CorruptWeights", "why CorruptWeights", True
    )


def test_last_words_hold_while_the_container_waits_and_while_it_tries_again() -> None:
    last = {"terminated": exited(2, words("InvalidFlags"))}
    for state in ({"waiting": {"reason": "CrashLoopBackOff"}}, {"running": {}}):
        cause = cause_of(make_pod("rev", container={"state": state, "lastState": last}))
        assert cause is not None
        assert cause.reason == "InvalidFlags"


def test_a_secret_that_lacks_the_key_is_named() -> None:
    message = "couldn't find key HF_TOKEN in Secret team/hub"
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
    cause = cause_of(make_pod("rev", container={"state": waiting}))
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("SecretMissing", True)
    assert cause.message.startswith("The Secret hub has no key HF_TOKEN; add it")


def test_pods_that_have_to_end_before_new_ones_start_are_named() -> None:
    ending = make_pod("older", name="chat-engine-old")
    ending["metadata"]["deletionTimestamp"] = "now"
    cause = cause_of(ending)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("DrainingOldPods", False)
    assert "chat-engine-old" in cause.message
    assert cause_of(ending, make_pod("rev", ready=True)) is None


def test_a_pod_that_became_ready_has_no_cause_whatever_its_past() -> None:
    last = {"terminated": exited(1, words("GpuOutOfMemory"))}
    assert cause_of(make_pod("rev", ready=True, container={"lastState": last})) is None


def test_pods_of_another_revision_or_on_their_way_out_do_not_count() -> None:
    failed = {"state": {"terminated": exited(1, words("ModelNotFound"))}}
    leaving = make_pod("rev", container=failed)
    leaving["metadata"]["deletionTimestamp"] = "now"
    cause = cause_of(make_pod("older", container=failed), leaving)
    assert cause is not None
    assert cause.reason == "DrainingOldPods"


@pytest.mark.parametrize(
    ("container", "reason", "is_stalled", "part"),
    [
        (
            {"state": {"waiting": {"reason": "ErrImagePull", "message": "no such host"}}},
            "ImagePullFailed",
            True,
            "The image img:1 cannot be pulled",
        ),
        ({"state": {"terminated": exited(137, reason="OOMKilled")}}, "OutOfMemory", True, "3Gi"),
        (
            {"state": {"terminated": exited(1, words("RankDied"), reason="OOMKilled")}},
            "OutOfMemory",
            True,
            "3Gi",
        ),
        (
            {"restartCount": 9, "lastState": {"terminated": exited(1, words("SourceUnreachable"))}},
            "SourceUnreachable",
            False,
            "why",
        ),
        (
            {
                "state": {
                    "waiting": {
                        "reason": "CreateContainerConfigError",
                        "message": 'secret "hub" not found',
                    }
                }
            },
            "SecretMissing",
            True,
            "hub",
        ),
        (
            {"restartCount": 3, "lastState": {"terminated": exited(1, "Segmentation fault")}},
            "CrashLooping",
            True,
            "Segmentation fault",
        ),
        ({"restartCount": 1, "lastState": {"terminated": exited(1)}}, "Restarting", False, "1"),
        (
            {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "root"}}},
            "CreateContainerConfigError",
            True,
            "root",
        ),
        ({"state": {"running": {}}}, "LoadingModel", False, "loads"),
    ],
)
def test_each_state_of_a_container_has_its_reason(
    container: dict[str, Any], reason: str, is_stalled: bool, part: str
) -> None:
    cause = cause_of(make_pod("rev", container=container))
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, is_stalled)
    assert part in cause.message


def killed_pod(probe: str, restarts: int = 1) -> tuple[Manifest, Manifest]:
    """A pod whose engine the kubelet restarted, and the event that says why."""
    last = {"terminated": exited(137, reason="Error")}
    pod = make_pod("rev", container={"restartCount": restarts, "lastState": last})
    pod["metadata"]["uid"] = "uid-1"
    message = f"Container engine failed {probe} probe, will be restarted"
    return pod, warning(message, reason="Killing")


@pytest.mark.parametrize(
    ("probe", "restarts", "is_stalled", "part"),
    [
        ("startup", 1, False, "spec.lifecycle.startupTimeoutSeconds (3600)"),
        ("liveness", 3, True, "spec.lifecycle.stallSeconds"),
    ],
)
def test_an_engine_that_a_probe_ended_says_which(
    probe: str, restarts: int, is_stalled: bool, part: str
) -> None:
    pod, event = killed_pod(probe, restarts)
    assert events_of(pod) == "reason=Killing"
    cause = cause_of(pod, events=[event])
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("ProbeFailed", is_stalled)
    assert part in cause.message
    alone = cause_of(pod)
    assert alone is not None
    assert alone.reason != "ProbeFailed"


def test_an_engine_that_was_ready_and_is_no_more_does_not_load() -> None:
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    for since, reason in (("01T00:05:00Z", "NotReady"), ("01T00:00:00Z", "LoadingModel")):
        pod = make_pod("rev", container={"started": True, "state": state})
        pod["status"]["conditions"][0]["lastTransitionTime"] = f"2026-01-{since}"
        cause = cause_of(pod)
        assert cause is not None
        assert cause.reason == reason


def test_an_engine_whose_node_is_lost_is_not_blamed() -> None:
    pod = make_pod("rev", container={"ready": True, "started": True})
    pod["spec"] = {"nodeName": "gpu-3"}
    pod["status"]["conditions"].append({"type": "ContainersReady", "status": "True"})
    cause = cause_of(pod)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("NodeUnreachable", False)
    assert "gpu-3" in cause.message
    pod["spec"]["readinessGates"] = [{"conditionType": "lb/a"}, {"conditionType": "lb/b"}]
    pod["status"]["conditions"].append({"type": "lb/a", "status": "True"})
    cause = cause_of(pod)
    assert cause is not None
    assert cause.reason == "ReadinessGateClosed"
    assert "lb/b is not true" in cause.message


def test_a_sidecar_does_not_speak_for_the_engine() -> None:
    pod = make_pod("rev", container={"state": {"terminated": exited(1, words("DoesNotFit"))}})
    sidecar = {"name": "agent", "image": "a", "restartCount": 0, "state": {"running": {}}}
    pod["status"]["containerStatuses"].insert(0, sidecar)
    cause = cause_of(pod)
    assert cause is not None
    assert cause.reason == "DoesNotFit"


def test_the_two_faces_of_a_failed_pull_read_the_same() -> None:
    states = (
        {"reason": "ErrImagePull", "message": "not found"},
        {
            "reason": "ImagePullBackOff",
            "message": 'Back-off pulling image "img:1": ErrImagePull: not found',
        },
    )
    causes = [cause_of(make_pod("rev", container={"state": {"waiting": s}})) for s in states]
    assert causes[0] == causes[1]


def failed_pod(name: str, created: str, reason: str = "Evicted") -> Manifest:
    pod = make_pod("rev", name=name)
    pod["metadata"]["creationTimestamp"] = created
    message = "The node was low on resource: memory."
    pod["status"] = {"phase": "Failed", "reason": reason, "message": message}
    return pod


def test_an_evicted_pod_explains_why_the_next_one_loads_the_model() -> None:
    evicted = [failed_pod(f"evicted-{n}", f"2026-01-0{n}T00:00:00Z") for n in (1, 2, 3)]
    loading = make_pod("rev", name="a-loading")
    cause = cause_of(loading, evicted[0])
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("Evicted", False)
    assert "low on resource: memory. Set spec.resources.memory" in cause.message
    cause = cause_of(loading, *evicted)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("Evicted", True)
    cause = cause_of(loading, failed_pod("x", "2026-01-01T00:00:00Z", "NodeShutdown"))
    assert cause is not None
    assert cause.reason == "PodFailed"
    assert "NodeShutdown" in cause.message


def test_an_eviction_is_past_when_a_later_pod_is_ready() -> None:
    evicted = failed_pod("evicted", "2026-01-01T00:00:00Z")
    ready = make_pod("rev", name="ready", ready=True)
    ready["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    assert cause_of(evicted, ready) is None
    cause = cause_of(evicted, ready, make_pod("rev", name="scaled-up"))
    assert cause is not None
    assert cause.reason == "LoadingModel"


def test_failed_pods_come_newest_first_and_without_those_that_go() -> None:
    pods = [failed_pod("a", "2026-01-01T00:00:00Z"), failed_pod("b", "2026-01-02T00:00:00Z")]
    going = failed_pod("c", "2026-01-03T00:00:00Z")
    going["metadata"]["deletionTimestamp"] = "now"
    found = failed_pods([*pods, going, make_pod("rev")])
    assert [pod["metadata"]["name"] for pod in found] == ["b", "a"]


def unstarted_pod() -> Manifest:
    waiting = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    pod = make_pod("rev", container=waiting)
    pod["metadata"]["uid"] = "uid-1"
    pod["status"]["phase"] = "Pending"
    pod["status"]["conditions"].append({"type": "PodScheduled", "status": "True"})
    return pod


def warning(message: str, *, reason: str = "FailedMount", uid: str = "uid-1") -> Manifest:
    event = {"reason": reason, "message": message, "lastTimestamp": "2026-01-01T00:00:00Z"}
    return {"involvedObject": {"uid": uid}, **event}


TIMED_OUT = warning("Unable to attach or mount volumes: timed out waiting for the condition")


@pytest.mark.parametrize(
    ("events", "reason", "is_stalled", "part"),
    [
        ([warning("mount.nfs: no route to host"), TIMED_OUT], "FailedMount", False, "no route"),
        ([TIMED_OUT], "FailedMount", False, "timed out"),
        ([warning('volume "keys" : secret "keys" not found')], "SecretMissing", True, "keys"),
        ([warning('configmap "c" not found')], "ConfigMapMissing", True, "ConfigMap c"),
        (
            [warning(f'sandbox "{"a1" * 32}": no CNI', reason="FailedCreatePodSandBox")],
            "FailedCreatePodSandBox",
            False,
            'sandbox "…": no CNI',
        ),
    ],
)
def test_a_pod_that_does_not_start_is_explained_by_its_warnings(
    events: list[Manifest], reason: str, is_stalled: bool, part: str
) -> None:
    assert is_unstarted(unstarted_pod())
    cause = cause_of(unstarted_pod(), events=events)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, is_stalled)
    assert part in cause.message


def test_warnings_of_other_pods_and_of_other_kinds_explain_nothing() -> None:
    others = [warning("x", uid="uid-2"), warning("probe failed", reason="Unhealthy")]
    assert cause_of(unstarted_pod(), events=others) is None
    assert not is_unstarted(make_pod("rev"))
    assert not is_unstarted(make_pod("rev", unschedulable="no room"))


def test_two_equal_crashes_read_the_same() -> None:
    tails = (
        "2026-01-01T10:00:00.123Z pagoda (pid 7) at 0x7f01",
        "2026-01-02T11:30:09.7Z pagoda (pid 812) at 0x7fee",
    )
    containers = [{"restartCount": 1, "lastState": {"terminated": exited(1, t)}} for t in tails]
    first, second = (cause_of(make_pod("rev", container=each)) for each in containers)
    assert first == second


def test_a_missed_deadline_says_what_the_pods_wait_for() -> None:
    missed = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    status = {"observedGeneration": 1, "conditions": [missed]}
    deployment = {"metadata": {"generation": 1}, "spec": DEADLINE, "status": status}
    old = make_pod("older", name="old", ready=True)
    cause = cause_of(old, make_pod("rev", unschedulable="taints"), deployment=deployment)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("ProgressDeadlineExceeded", True)
    assert cause.message == (
        "The pods of revision rev did not become ready within 600 s; the engines of revision older "
        "serve on. The scheduler says: taints"
    )


def test_a_paused_rollout_is_said_as_long_as_there_are_engines_of_another_revision() -> None:
    deployment = {**QUIET, "spec": {"paused": True}}
    old = make_pod("older", name="old", ready=True)
    said = "spec.rollout.paused holds the engines that the spec asks for back"
    assert cause_of(deployment=deployment) == Cause("RolloutPaused", f"{said}.", False)
    assert cause_of(old, deployment=deployment) == Cause(
        "RolloutPaused", f"{said}; the engines of revision older serve on.", False
    )
    assert cause_of(make_pod("rev", ready=True), deployment=deployment) is None


def test_new_pods_wait_for_what_old_ones_leave_to_them() -> None:
    ending = make_pod("older", name="chat-engine-old")
    ending["metadata"]["deletionTimestamp"] = "2026-11-21T12:00:00Z"
    cause = cause_of(ending, make_pod("rev", unschedulable="1 Insufficient nvidia.com/gpu"))
    text = "New engines start when chat-engine-old has ended."
    assert cause == Cause("DrainingOldPods", text, False)


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (
            {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: team"},
            "QuotaExceeded",
        ),
        (
            {"type": "ReplicaFailure", "status": "True", "message": "violates PodSecurity"},
            "PodsForbidden",
        ),
        (
            {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"},
            "ProgressDeadlineExceeded",
        ),
    ],
)
def test_what_the_deployment_says_counts_for_its_present_spec_only(
    condition: dict[str, Any], reason: str
) -> None:
    status: dict[str, Any] = {"conditions": [condition]}
    deployment = {"metadata": {"generation": 2}, "spec": DEADLINE, "status": status}
    assert cause_of(deployment=deployment) is None
    status["observedGeneration"] = 2
    cause = cause_of(deployment=deployment)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, True)


def test_a_cause_that_needs_a_person_comes_before_one_that_does_not() -> None:
    waiting = make_pod("rev", name="a", unschedulable="Insufficient nvidia.com/gpu")
    failed = make_pod(
        "rev", name="b", container={"state": {"terminated": exited(1, words("DoesNotFit"))}}
    )
    cause = cause_of(waiting, failed)
    assert cause is not None
    assert cause.reason == "DoesNotFit"
