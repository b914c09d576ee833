"""Why a pod has no node, from its gates and from what the scheduler says. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pagoda_operator.cause import Cause
from pagoda_operator.flags import model_claim
from pagoda_operator.names import Manifest
from pagoda_operator.spec import LLMServiceSpec

_VOLUME = re.compile(r"persistent ?volume|volume node affinity|max volume count", re.IGNORECASE)


def cause_of_gates(spec: LLMServiceSpec, pod: Manifest) -> Cause:
    """Of a pod that the scheduler may not look at yet."""
    gates = ", ".join(gate["name"] for gate in pod.get("spec", {}).get("schedulingGates", []))
    queue = spec.resources.queue_name
    if queue is not None and "kueue.x-k8s.io/" in gates:
        text = f"Kueue has not admitted the pod to the queue {queue} (spec.resources.queueName) yet"
        return Cause("Queued", f"{text}; see its Workload.", False)
    return Cause("SchedulingGated", f"The pod waits until its gates are removed: {gates}.", False)


def cause_of_unscheduled(spec: LLMServiceSpec, message: str, older: Sequence[Manifest]) -> Cause:
    """Of a pod for which the scheduler found no node.

    Args:
        older: pods of earlier revisions, which may hold the room that it needs.
    """
    claim = model_claim(spec.model.uri)
    if claim and f'persistentvolumeclaim "{claim}" not found' in message:
        text = f"The PersistentVolumeClaim {claim} of spec.model.uri does not exist in this "
        return Cause("ModelNotFound", text + "namespace; create it, or correct the uri.", True)
    said = f"The scheduler says: {message}"
    if older and "Insufficient" in message and spec.rollout.first_strategy == "Surge":
        names = ", ".join(str(pod["metadata"]["name"]) for pod in older)
        remedy = "Set spec.rollout.strategy to InPlace or Recreate, which stop the old one first"
        if spec.rollout.strategy == "Auto":
            remedy = "What becomes of it is in status.rollout"
        text = (
            f"There is no room for a new engine beside {names}, which holds its own until the new "
            f"one is ready. {remedy}, or make room. {said}"
        )
        return Cause("NoRoomToSurge", text, False)
    wants = list(_find_wants(spec, message))
    if not wants:
        return Cause("Unschedulable", said, False)
    reason = wants[0][0]
    return Cause(reason, " ".join([*(text for _, text in wants), said]), False)


def _find_wants(spec: LLMServiceSpec, message: str) -> Iterator[tuple[str, str]]:
    """Reasons, each with what is wanting and helps.

    Nodes fall out one after the other by taints, by labels, by room and by volumes: what the last
    step says comes first, since its nodes are nearest to taking the pod.
    """
    resources = spec.resources
    if _VOLUME.search(message):
        yield (
            "VolumeUnavailable",
            "No node can have a volume of the pods; see the PersistentVolumeClaims of "
            "spec.model.uri, spec.cache.pvc and spec.podTemplate.volumes.",
        )
    if (text := _find_want_of_gpus(spec, message)) is not None:
        yield "InsufficientGPU", text
    memory = resources.memory_request or resources.memory
    for name, reason, wanted, field in (
        ("memory", "InsufficientMemory", f"{memory} of memory", "memoryRequest or memory"),
        ("cpu", "InsufficientCPU", f"{resources.cpu} CPUs", "cpu"),
        (
            "ephemeral-storage",
            "InsufficientStorage",
            f"{resources.ephemeral_storage} of disk",
            "ephemeralStorage",
        ),
    ):
        if f"Insufficient {name}" in message:
            text = f"No node has {wanted} free; lower spec.resources.{field}, or make room."
            yield reason, text
    if "node affinity" in message and not spec.resources.gpu.products:
        yield (
            "NoMatchingNode",
            "No node has the labels that spec.podTemplate.nodeSelector and affinity ask for; "
            "correct them, or label a node.",
        )
    if "untolerated taint" in message:
        text = "Nodes have taints that the pods do not tolerate; add spec.podTemplate.tolerations,"
        yield "UntoleratedTaint", f"{text} or remove the taint."


def _find_want_of_gpus(spec: LLMServiceSpec, message: str) -> str | None:
    """The want of GPUs, of the wanted products where there are such, if that is what it is."""
    gpu = spec.resources.gpu
    if gpu.claims and "cannot allocate all claims" in message:
        return "No node has devices free for spec.resources.gpu.claims; free some, or add a node."
    is_missing = f"Insufficient {gpu.resource_name}" in message
    text = f"No node has {spec.num_gpus} free {gpu.resource_name}"
    if gpu.products:
        # A node without the product does not match; what is insufficient is so where it matches.
        is_missing |= (
            "didn't match Pod's node affinity" in message and "Insufficient" not in message
        )
        text = (
            # One with a taint, or another label than the pods ask for, may have them.
            f"No node that takes the pods has {spec.num_gpus} free {gpu.resource_name} of the "
            f"product {' or '.join(gpu.products)} (spec.resources.gpu.products)"
        )
    return f"{text}; free some, or add a node." if is_missing else None
