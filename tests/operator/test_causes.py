"""Why a pod does not serve."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagoda_operator.causes import Cause, find_cause, parse_last_words
from pagoda_operator.names import Manifest
from pagoda_operator.testing import make_pod, make_service

SPEC = make_service({"resources": {"gpu": {"count": 1}, "memory": "3Gi"}}).spec
QUIET: Manifest = {"metadata": {"generation": 1}, "status": {"observedGeneration": 1}}


def cause_of(*pods: Manifest, deployment: Manifest = QUIET) -> Cause | None:
    return find_cause(SPEC, deployment, pods, "rev")


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


def test_a_pod_that_became_ready_has_no_cause_whatever_its_past() -> None:
    last = {"terminated": exited(1, words("GpuOutOfMemory"))}
    assert cause_of(make_pod("rev", ready=True, container={"lastState": last})) is None


def test_pods_of_another_revision_or_on_their_way_out_do_not_count() -> None:
    failed = {"state": {"terminated": exited(1, words("ModelNotFound"))}}
    leaving = make_pod("rev", container=failed)
    leaving["metadata"]["deletionTimestamp"] = "now"
    assert cause_of(make_pod("older", container=failed), leaving) is None


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


@pytest.mark.parametrize(
    ("message", "reason", "is_stalled"),
    [
        ("0/3 nodes: 3 Insufficient nvidia.com/gpu.", "InsufficientGPU", False),
        ('persistentvolumeclaim "models" not found', "ModelNotFound", True),
        ("0/3 nodes: 3 Insufficient cpu.", "Unschedulable", False),
    ],
)
def test_a_pod_without_a_node_says_what_it_waits_for(
    message: str, reason: str, is_stalled: bool
) -> None:
    cause = cause_of(make_pod("rev", unschedulable=message))
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, is_stalled)


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
    deployment = {"metadata": {"generation": 2}, "status": {"conditions": [condition]}}
    assert cause_of(deployment=deployment) is None
    deployment["status"]["observedGeneration"] = 2
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


def test_only_a_json_line_with_a_known_reason_is_last_words() -> None:
    assert parse_last_words('{"reason": "Whatever", "message": "x"}') is None
    assert parse_last_words("[1]\n7\nnull\nnot json") is None
    assert parse_last_words(words("DiskFull") + "more log") == ("DiskFull", "why DiskFull")
