"""Fights about a child."""

from __future__ import annotations

from pagoda_operator.contest import CALM_SECONDS, FORGET_SECONDS, Contests, Edit
from pagoda_operator.names import ChildRef, Manifest
from pagoda_operator.ownership import describe_rivals, describe_scaler

EDIT = Edit(ChildRef("Deployment", "chat-engine"), "rival sets spec.x")


def fought(*times: float) -> Contests:
    contests = Contests()
    for time in times:
        contests.note(EDIT, time)
    return contests


def test_the_first_correction_is_immediate_and_each_further_one_waits_twice_as_long() -> None:
    assert Contests().waits(5.0) == {}
    assert fought(0.0).waits(0.0) == {EDIT: 1.0}
    assert fought(0.0, 1.0).waits(1.5) == {EDIT: 1.5}
    assert fought(0.0, 1.0, 3.0).waits(3.0) == {EDIT: 4.0}
    assert fought(0.0, 1.0, 3.0).waits(7.0) == {}


def test_the_wait_is_bounded_however_long_the_fight_lasts() -> None:
    contests = fought(*(300.0 * number for number in range(3000)))
    assert contests.waits(300.0 * 2999) == {EDIT: 300.0}


def test_another_edit_of_the_same_child_is_a_first_one() -> None:
    other = EDIT._replace(rival="rival sets spec.y")
    contests = fought(0.0, 1.0, 3.0)
    assert other not in contests.waits(3.0)
    contests.note(other, 3.0)
    assert contests.waits(3.0) == {EDIT: 4.0, other: 1.0}


def test_after_a_long_quiet_time_a_correction_is_a_first_one() -> None:
    contests = fought(0.0, 1.0, 3.0, 7.0)
    assert contests.waits(7.0 + FORGET_SECONDS) == {}
    contests.note(EDIT, 7.0 + FORGET_SECONDS)
    assert contests.waits(7.0 + FORGET_SECONDS) == {EDIT: 1.0}


def test_an_edit_and_another_are_no_fight_and_a_third_one_is_said() -> None:
    assert fought(0.0, 1.0).find_cause([EDIT], 2.0) is None
    cause = fought(0.0, 1.0, 3.0).find_cause([EDIT], 4.0)
    assert cause is not None
    assert (cause.reason, cause.is_stalled) == ("Contested", True)
    assert cause.message.startswith(
        "Rival sets spec.x of Deployment chat-engine again and again. It is put back"
    )


def test_a_fight_is_said_while_the_child_waits_and_for_a_while_after_it() -> None:
    contests = fought(*range(12))
    assert contests.find_cause([EDIT], 11.0 + 2 * CALM_SECONDS) is not None
    assert contests.find_cause([], 11.0 + CALM_SECONDS - 1) is not None
    assert contests.find_cause([], 11.0 + CALM_SECONDS) is None


def managed(**managers: Manifest) -> Manifest:
    entries = [
        {"manager": name, "operation": "Update", "fieldsV1": fields}
        for name, fields in managers.items()
    ]
    return {"metadata": {"managedFields": entries}}


def test_rivals_are_named_with_the_paths_of_their_fields() -> None:
    container = {'k:{"name":"engine"}': {".": {}, "f:image": {}}}
    spec = {"f:template": {"f:spec": {"f:containers": container, "f:tolerations": {}}}}
    assert describe_rivals(managed(vpa={"f:spec": spec})) == (
        "vpa sets spec.template.spec.containers[engine].image, spec.template.spec.tolerations"
    )


def test_of_many_fields_some_are_named() -> None:
    spec = {f"f:{letter}": {} for letter in "edcba"}
    assert describe_rivals(managed(vpa={"f:spec": spec})) == (
        "vpa sets spec.a, spec.b, spec.c and 2 more"
    )


def test_what_no_manager_owns_was_removed_or_deleted() -> None:
    assert describe_rivals(managed()) == "somebody removes fields"
    assert describe_rivals(None) == "somebody deletes the whole"


def test_who_scales_a_deployment_is_named() -> None:
    replicas = {"f:spec": {"f:replicas": {}}}
    assert describe_scaler(managed(hpa=replicas, pagoda={})) == "hpa sets spec.replicas"
    assert describe_scaler(managed()) == "somebody sets spec.replicas"
