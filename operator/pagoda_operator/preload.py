"""The Job that fills a claim with a model before engines start: its manifest, and how it is. Pure.

Its name holds a digest of its pod, since the pods of a Job cannot be changed: another model is
another Job, and the one before it is deleted as any child that is not wanted any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagoda_operator.cause import Cause
from pagoda_operator.causes import cause_of_pod
from pagoda_operator.child import render_child
from pagoda_operator.flags import pull_args
from pagoda_operator.names import (
    LABEL_COMPONENT,
    LABEL_JOB,
    PRELOAD,
    ChildRef,
    Manifest,
    digest,
    find_condition,
    is_leaving,
)
from pagoda_operator.pod import render_pull_template
from pagoda_operator.spec import LLMService

# As an engine it is tried for ever, by the kubelet and more and more seldom: what is wrong stands
# in its pod until somebody corrects it.
MAX_RESTARTS = 2**31 - 1


def render_preload(service: LLMService, engine_image: str) -> Manifest:
    """The Job of a service whose cache is to be filled first."""
    template = render_pull_template(service, engine_image, pull_args(service))
    template["metadata"]["labels"][LABEL_COMPONENT] = PRELOAD
    spec = {
        "suspend": service.spec.suspend,
        "backoffLimit": MAX_RESTARTS,
        "template": template,
    }
    job = render_child(service, "Job", spec=spec)
    job["metadata"]["name"] = f"{service.key.name}-load-{digest(template)[:7]}"
    job["metadata"]["labels"][LABEL_COMPONENT] = PRELOAD
    return job


def find_preloading(
    service: LLMService,
    wanted: Mapping[ChildRef, Manifest],
    children: Mapping[ChildRef, Manifest],
    pods: Sequence[Manifest],
    events: Sequence[Manifest],
) -> Cause | None:
    """Why engines have to wait for the claim to be filled; None if they do not.

    Args:
        pods: of Jobs of this service.
        events: warnings about them, if they do not start.
    """
    job = next((ref for ref in wanted if ref.kind == "Job"), None)
    if job is None:
        return None
    found = children.get(job, {})
    if find_condition(found.get("status", {}), "Complete").get("status") == "True":
        return None
    causes = [
        cause_of_pod(service.spec, pod, (), events)
        for pod in pods
        if not is_leaving(pod)
        # The Job says so a moment later.
        and pod.get("status", {}).get("phase") != "Succeeded"
        and pod["metadata"]["labels"].get(LABEL_JOB) == job.name
    ]
    troubles = [cause for cause in causes if cause is not None and cause.reason != "LoadingModel"]
    claim = service.spec.cache.pvc
    assert claim is not None, "the CRD allows preload with a claim alone"
    text = f"{job} fills the claim {claim.claim_name} (spec.cache.pvc) before engines start."
    return troubles[0] if troubles else Cause("Preloading", text, False)
