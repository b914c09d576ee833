"""Why a pod has no node, or does not get to its node's kubelet."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pagoda_operator.cause import Cause
from pagoda_operator.causes import find_cause, is_unstarted
from pagoda_operator.names import Manifest
from pagoda_operator.spec import LLMServiceSpec
from pagoda_operator.testing import make_pod, make_service

SPEC = make_service({"resources": {"gpu": {"count": 1}, "memory": "3Gi"}}).spec
QUIET: Manifest = {"metadata": {"generation": 1}, "status": {"observedGeneration": 1}}


def cause_of(
    *pods: Manifest, spec: LLMServiceSpec = SPEC, events: Sequence[Manifest] = ()
) -> Cause | None:
    return find_cause(spec, QUIET, pods, "rev", events)


@pytest.mark.parametrize(
    ("message", "reason", "is_stalled"),
    [
        ("0/3 nodes: 3 Insufficient nvidia.com/gpu.", "InsufficientGPU", False),
        ('persistentvolumeclaim "models" not found', "ModelNotFound", True),
        ("0/3 nodes: 3 Insufficient cpu.", "InsufficientCPU", False),
        ("0/3 nodes: 3 Insufficient memory, 1 Insufficient cpu.", "InsufficientMemory", False),
        ("0/3 nodes: 3 Insufficient ephemeral-storage.", "InsufficientStorage", False),
        ("0/3 nodes: 3 node(s) were unschedulable.", "Unschedulable", False),
        ("0/3 nodes: 3 node(s) had untolerated taint(s).", "UntoleratedTaint", False),
        # The node without the taint is the one that could take the pod.
        ("0/3 nodes: 1 Insufficient cpu, 2 node(s) had untolerated taint(s)", "InsufficientCPU", 0),
        ("pod has unbound immediate PersistentVolumeClaims", "VolumeUnavailable", False),
        ("1 Insufficient cpu, 1 node(s) had volume node affinity conflict", "VolumeUnavailable", 0),
    ],
)
def test_a_pod_without_a_node_says_what_it_waits_for_and_what_helps(
    message: str, reason: str, is_stalled: bool
) -> None:
    cause = cause_of(make_pod("rev", unschedulable=message))
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, is_stalled)
    assert ("spec." in cause.message) == (reason not in ("Unschedulable", "InsufficientGPU"))


ELSEWHERE = "didn't match Pod's node affinity/selector"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (f"0/3 nodes: 3 node(s) {ELSEWHERE}.", "InsufficientGPU"),
        (f"0/3 nodes: 1 Insufficient nvidia.com/gpu, 2 node(s) {ELSEWHERE}.", "InsufficientGPU"),
        # A node has the product, and its GPUs are not what is wanting.
        (f"0/3 nodes: 1 Insufficient memory, 2 node(s) {ELSEWHERE}.", "InsufficientMemory"),
        ("0/3 nodes: 3 node(s) had untolerated taint {a: b}.", "UntoleratedTaint"),
    ],
)
def test_gpus_of_a_product_that_no_node_has_are_named(message: str, reason: str) -> None:
    gpu = {"products": ["NVIDIA-L4", "NVIDIA-L40S"], "count": 2}
    spec = make_service({"engine": {"tensorParallelSize": 2}, "resources": {"gpu": gpu}}).spec
    cause = cause_of(make_pod("rev", unschedulable=message), spec=spec)
    assert cause is not None
    assert cause.reason == reason
    named = (
        "No node that takes the pods has 2 free nvidia.com/gpu of the product NVIDIA-L4 or "
        "NVIDIA-L40S (spec.resources.gpu.products); free some, or add a node. The scheduler says: "
        f"{message}"
    )
    assert (cause.message == named) == (reason == "InsufficientGPU")


def test_an_affinity_of_the_users_own_is_no_want_of_gpus() -> None:
    message = f"0/3 nodes: 3 node(s) {ELSEWHERE}."
    cause = cause_of(make_pod("rev", unschedulable=message))
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("NoMatchingNode", False)
    assert "spec.podTemplate.nodeSelector" in cause.message


CPU = {"resources": {"gpu": {"count": 0}}}
SURGING = make_service({**CPU, "rollout": {"strategy": "Surge"}}).spec
NO_ROOM = "0/1 nodes are available: 1 Insufficient memory."


def test_a_surge_without_room_names_what_holds_it_and_what_to_choose() -> None:
    old = make_pod("older", name="chat-engine-old", ready=True)
    cause = cause_of(old, make_pod("rev", unschedulable=NO_ROOM), spec=SURGING)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("NoRoomToSurge", False)
    assert "chat-engine-old" in cause.message
    assert "spec.rollout.strategy" in cause.message
    assert NO_ROOM in cause.message
    cause = cause_of(old, make_pod("rev", unschedulable=NO_ROOM), spec=make_service(CPU).spec)
    assert cause is not None
    assert "What becomes of it is in status.rollout" in cause.message


def test_without_an_older_pod_or_a_surge_the_scheduler_has_the_word() -> None:
    waiting = make_pod("rev", unschedulable=NO_ROOM)
    in_place = {"resources": {"gpu": {"count": 0}}, "rollout": {"strategy": "InPlace"}}
    causes = [
        cause_of(waiting, make_pod("rev", name="a", ready=True), spec=SURGING),
        cause_of(waiting, make_pod("older", name="a"), spec=make_service(in_place).spec),
    ]
    assert [cause.reason for cause in causes if cause] == ["InsufficientMemory"] * 2


CLAIMS = [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
CLAIMING = make_service({"resources": {"gpu": {"claims": CLAIMS}, "queueName": "team"}}).spec


def test_claims_that_no_node_can_meet_are_a_want_of_gpus() -> None:
    said = "0/1 nodes are available: 1 cannot allocate all claims."
    cause = cause_of(make_pod("rev", unschedulable=said), spec=CLAIMING)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("InsufficientGPU", False)
    assert "No node has devices free for spec.resources.gpu.claims" in cause.message
    assert cause.message.endswith(f"The scheduler says: {said}")


def test_a_missing_template_of_a_claim_is_named_though_the_scheduler_is_silent() -> None:
    pod = make_pod("rev") | {"spec": {"resourceClaims": CLAIMS}}
    pod["metadata"]["uid"] = "u"
    pod["status"] = {"phase": "Pending"}
    assert is_unstarted(pod)
    event = {
        "involvedObject": {"uid": "u"},
        "reason": "FailedResourceClaimCreation",
        "message": 'PodResourceClaim gpu: resource claim template "one-gpu": '
        'resourceclaimtemplate.resource.k8s.io "one-gpu" not found',
    }
    cause = cause_of(pod, spec=CLAIMING, events=[event])
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("ResourceClaimTemplateMissing", True)
    assert cause.message.startswith("The ResourceClaimTemplate one-gpu does not exist")


@pytest.mark.parametrize(
    ("gate", "reason", "part"),
    [
        ("kueue.x-k8s.io/admission", "Queued", "the queue team (spec.resources.queueName)"),
        ("example.com/quota", "SchedulingGated", "example.com/quota"),
    ],
)
def test_a_pod_behind_a_gate_waits_for_its_queue_or_for_who_set_it(
    gate: str, reason: str, part: str
) -> None:
    pod = make_pod("rev", unschedulable="Scheduling is blocked due to non-empty scheduling gates")
    pod["status"]["conditions"][-1]["reason"] = "SchedulingGated"
    pod["spec"] = {"schedulingGates": [{"name": gate}]}
    cause = cause_of(pod, spec=CLAIMING)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == (reason, False)
    assert part in cause.message
