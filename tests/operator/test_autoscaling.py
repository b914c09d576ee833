"""The condition that says whether the replicas follow the demand."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda_operator.names import Manifest
from pagoda_operator.ownership import replicas_owner
from pagoda_operator.scaling import ScalingPolicy, initial_target
from pagoda_operator.status import autoscaling_condition
from pagoda_operator.testing import make_manifest, make_service

SCALED = {"autoscaling": {"maxReplicas": 3}}


def found(spec: dict[str, Any], **more: str) -> tuple[bool | None, str, str]:
    arguments = {"replicas_owner": None, "blindness": None, **more}
    return autoscaling_condition(make_service(spec).spec, **arguments)["AutoscalingActive"]


def test_a_service_without_autoscaling_has_no_such_condition() -> None:
    spec = make_service({"replicas": 3}).spec
    assert autoscaling_condition(spec, replicas_owner="kubectl", blindness=None) == {}


def test_replicas_that_follow_the_demand_are_active() -> None:
    assert found(SCALED)[:2] == (True, "Active")


def test_a_fixed_number_and_a_suspended_service_are_not() -> None:
    assert found({"autoscaling": {"minReplicas": 2, "maxReplicas": 2}})[:2] == (False, "Fixed")
    assert found({**SCALED, "suspend": True})[:2] == (False, "Suspended")


@pytest.mark.parametrize(("replicas", "kept"), [(0, 2), (2, 2), (4, 4), (9, 5)])
def test_an_external_driver_sets_the_replicas_within_their_bounds(replicas: int, kept: int) -> None:
    scaled = {"driver": "External", "minReplicas": 2, "maxReplicas": 5}
    spec = {"autoscaling": scaled, "replicas": replicas}
    parsed = make_service(spec).spec
    assert ScalingPolicy.of(parsed) is None
    assert initial_target(parsed, remembered=3, live=3) == parsed.min_replicas == kept
    is_active, reason, message = found(spec, replicas_owner="hpa")
    assert (is_active, reason) == (None, "External")
    assert ("out of bounds" in message) == (replicas != kept)
    assert found({**spec, "suspend": True})[1] == "Suspended"


def test_blind_scaling_says_why_and_what_helps() -> None:
    is_active, reason, message = found(SCALED, blindness="no ready replica tells its load")
    assert (is_active, reason) == (False, "LoadUnknown")
    assert "blind: no ready replica tells its load" in message
    assert "NetworkPolicy" in message


def test_replicas_without_effect_are_named_with_who_set_them() -> None:
    is_active, reason, message = found({**SCALED, "replicas": 2}, replicas_owner="flux")
    assert (is_active, reason) == (True, "ReplicasIgnored")
    assert "spec.replicas: 2, set by flux, has no effect" in message


def owned(replicas: int, **entry: str) -> Manifest:
    manifest = make_manifest({"replicas": replicas})
    fields = {"f:spec": {"f:replicas": {}}}
    manifest["metadata"]["managedFields"] = [{"manager": "who", "fieldsV1": fields, **entry}]
    return manifest


@pytest.mark.parametrize(
    ("replicas", "entry", "owner"),
    [
        (1, {"operation": "Update"}, None),
        (1, {"operation": "Apply"}, "who"),
        (1, {"operation": "Update", "subresource": "scale"}, "who"),
        (3, {"operation": "Update"}, "who"),
    ],
)
def test_the_default_of_the_crd_belongs_to_nobody(
    replicas: int, entry: dict[str, str], owner: str | None
) -> None:
    assert replicas_owner(owned(replicas, **entry)) == owner
