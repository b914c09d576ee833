"""Which writes are needed."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.names import ChildRef, Manifest
from pagoda_operator.ownership import take_over
from pagoda_operator.plan import Applied, Memory, Plan, is_put_back, make_plan
from pagoda_operator.render import render_children
from pagoda_operator.spec import LLMService
from pagoda_operator.testing import make_service

DEPLOYMENT = ChildRef("Deployment", "chat-engine")
SERVICE = ChildRef("Service", "chat")


class Observed(NamedTuple):
    """What the API server holds, and what the operator remembers to have applied."""

    children: dict[ChildRef, Manifest]
    applied: dict[ChildRef, Applied]


def plan(service: LLMService, observed: Observed, target: int = 1) -> Plan:
    wanted, memory = render_children(service, engine_image="engine:1"), Memory(observed.applied)
    return make_plan(service, wanted, observed.children, memory, target_replicas=target, now=0.0)


def nothing() -> Observed:
    return Observed(children={}, applied={})


def carry_out(made: Plan, observed: Observed) -> Observed:
    """What there is after the plan's writes, defaults of the server included."""
    children, applied = dict(observed.children), dict(observed.applied)
    for apply in made.applies:
        live = copy.deepcopy(apply.manifest)
        live["metadata"] |= {"uid": f"uid-{apply.ref}", "resourceVersion": "1", "generation": 1}
        live.setdefault("spec", {})["addedByTheServer"] = True
        live["status"] = {"replicas": 1}
        children[apply.ref] = live
        applied[apply.ref] = Applied.of(apply.manifest, live)
    for live in made.deletes:
        del children[ChildRef.of(live)]
    return Observed(children=children, applied=applied)


def steady() -> Observed:
    return carry_out(plan(make_service(), nothing()), nothing())


def edited(observed: Observed, ref: ChildRef, **metadata: Any) -> tuple[Observed, Manifest]:
    children = copy.deepcopy(dict(observed.children))
    children[ref]["metadata"] |= metadata
    return Observed(children=children, applied=observed.applied), children[ref]


def test_a_new_service_gets_all_children_with_the_target_replicas() -> None:
    made = plan(make_service(), nothing(), target=3)
    assert [apply.ref.kind for apply in made.applies] == ["ServiceAccount", "Service", "Deployment"]
    assert all(apply.live is None for apply in made.applies)
    assert made.applies[-1].manifest["spec"]["replicas"] == 3


engines = st.fixed_dictionaries({"maxNumSeqs": st.integers(1, 100), "prefixCaching": st.booleans()})


@given(engine=engines, target=st.integers(0, 9))
def test_planning_on_the_result_of_a_plan_changes_nothing(
    engine: dict[str, Any], target: int
) -> None:
    service = make_service({"engine": engine})
    observed = carry_out(plan(service, nothing(), target), nothing())
    assert plan(service, observed, target) == Plan()


def test_a_changed_spec_is_applied_to_the_deployment_alone() -> None:
    made = plan(make_service({"engine": {"maxNumSeqs": 9}}), steady())
    assert [apply.ref for apply in made.applies] == [DEPLOYMENT]


def test_status_and_replicas_of_a_child_are_no_drift() -> None:
    observed, live = edited(steady(), DEPLOYMENT)
    live["status"] = {"replicas": 5}
    live["spec"]["replicas"] = 5
    assert plan(make_service(), observed, target=5) == Plan()


def test_secrets_of_a_service_account_are_no_drift() -> None:
    observed, live = edited(steady(), ChildRef("ServiceAccount", "chat-engine"))
    live |= {"secrets": [{"name": "token"}], "imagePullSecrets": [{"name": "registry"}]}
    assert plan(make_service(), observed) == Plan()


def test_an_edited_spec_or_label_of_a_child_is_drift() -> None:
    observed, live = edited(steady(), SERVICE)
    live["spec"]["ports"][0]["port"] = 81
    assert [apply.ref for apply in plan(make_service(), observed).applies] == [SERVICE]
    observed, _ = edited(steady(), SERVICE, labels={})
    assert [apply.ref for apply in plan(make_service(), observed).applies] == [SERVICE]


def test_an_edit_is_undone_as_one_also_where_the_strategy_is_another_one_now() -> None:
    observed, live = edited(steady(), DEPLOYMENT)
    service = make_service()
    wanted = render_children(service, engine_image="engine:1", strategy="InPlace")

    def undone() -> bool:
        memory = Memory(observed.applied)
        made = make_plan(service, wanted, observed.children, memory, target_replicas=1, now=0.0)
        (apply,) = made.applies
        return apply.undoes is not None

    assert not undone()
    live["spec"]["template"]["spec"]["tolerations"] = [{"operator": "Exists"}]
    assert undone()


def test_a_restarted_operator_applies_once_what_it_does_not_remember() -> None:
    observed = Observed(children=steady().children, applied={})
    made = plan(make_service(), observed)
    assert len(made.applies) == 3
    assert not any(apply.live is None for apply in made.applies)


def test_replicas_are_sent_as_they_are_until_the_scaling_manager_owns_them() -> None:
    observed, live = edited(steady(), DEPLOYMENT)
    live["spec"]["replicas"] = 4
    service = make_service({"engine": {"maxNumSeqs": 9}})
    assert plan(service, observed, target=1).applies[0].manifest["spec"]["replicas"] == 4
    scaling = {"manager": "pagoda-scaling", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    live["metadata"]["managedFields"] = [scaling]
    assert "replicas" not in plan(service, observed, target=1).applies[0].manifest["spec"]


def test_scaling_names_the_uid_and_says_nothing_when_the_number_is_right() -> None:
    observed = steady()
    assert plan(make_service(), observed, target=1).applies == ()
    (scale,) = plan(make_service(), observed, target=2).applies
    live = observed.children[DEPLOYMENT]
    assert scale.manager == "pagoda-scaling"
    assert scale.manifest["metadata"]["uid"] == live["metadata"]["uid"]
    assert scale.manifest["spec"] == {"replicas": 2}


def test_a_strangers_child_is_a_conflict_and_nothing_is_written() -> None:
    observed, _ = edited(steady(), SERVICE, ownerReferences=[])
    made = plan(make_service({"engine": {"maxNumSeqs": 9}}), observed)
    assert made.applies == ()
    assert made.conflicts == (
        "Service chat exists and belongs to no LLMService; "
        "delete it, or give this LLMService another name",
    )


def test_a_child_that_lost_its_owner_is_adopted_and_a_strangers_with_our_labels_is_not() -> None:
    observed, live = edited(steady(), SERVICE, ownerReferences=[])
    assert plan(make_service(), observed).conflicts
    live["metadata"]["managedFields"] = [entry("pagoda", {"f:spec": {}}, operation="Apply")]
    made = plan(make_service(), observed)
    assert [(apply.ref, apply.live is None) for apply in made.applies] == [(SERVICE, False)]
    assert made.applies[0].manifest["metadata"]["ownerReferences"][0]["uid"] == "uid-of-chat"
    live["metadata"]["labels"]["pagoda.dev/service"] = "another"
    assert plan(make_service(), observed).conflicts


def test_what_a_backup_put_back_is_adopted_though_nobody_knows_who_set_its_fields() -> None:
    observed, live = edited(steady(), SERVICE, ownerReferences=[])
    live["metadata"]["labels"]["velero.io/restore-name"] = "nightly"
    live["metadata"]["managedFields"] = [entry("velero", {"f:spec": {"f:old": {}}})]
    (apply,) = plan(make_service(), observed).applies
    assert apply.adopts
    assert apply.taken_over is not None
    (ours,) = apply.taken_over["managedFields"]
    assert (ours["manager"], ours["operation"], ours["apiVersion"]) == ("pagoda", "Apply", "v1")
    assert ours["fieldsV1"] == {"f:spec": {"f:old": {}}}


def test_a_child_of_a_deleted_service_of_the_same_name_is_waited_for() -> None:
    dead = {"kind": "LLMService", "name": "chat", "uid": "another", "controller": True}
    observed, _ = edited(steady(), DEPLOYMENT, ownerReferences=[dead])
    made = plan(make_service(), observed)
    assert (made.applies, made.conflicts, made.requeue_seconds) == ((), (), 1.0)
    assert "belongs to a deleted LLMService of this name" in made.waiting[0]


def test_a_child_that_is_being_deleted_is_waited_for() -> None:
    gone = {"deletionTimestamp": "now", "finalizers": ["team.dev/keep"]}
    observed, _ = edited(steady(), DEPLOYMENT, **gone)
    made = plan(make_service(), observed)
    assert (made.applies, made.requeue_seconds) == ((), 1.0)
    assert "team.dev/keep" in made.waiting[0]


def test_a_child_of_ours_that_is_not_wanted_is_deleted_by_its_uid() -> None:
    observed = steady()
    extra = copy.deepcopy(observed.children[SERVICE])
    extra["metadata"] |= {"name": "chat-old", "uid": "uid-old"}
    ref = ChildRef("Service", "chat-old")
    both = Observed(children={**observed.children, ref: extra}, applied=observed.applied)
    (delete,) = plan(make_service(), both).deletes
    assert (ChildRef.of(delete), delete["metadata"]["uid"]) == (ref, "uid-old")
    extra["metadata"]["ownerReferences"] = []
    assert plan(make_service(), both).deletes == ()


def test_what_was_left_behind_and_is_not_wanted_any_more_goes_too() -> None:
    """A NetworkPolicy that an orphaned service had would close the pods of the next one."""
    ref = ChildRef("NetworkPolicy", "chat-engine")
    service = make_service({"networkPolicy": {"enabled": True}})
    live = carry_out(plan(service, nothing()), nothing()).children[ref]
    live["metadata"]["ownerReferences"] = []
    observed = Observed(children={ref: live}, applied={})
    assert plan(make_service(), observed).deletes == ()
    live["metadata"]["managedFields"] = [entry("pagoda", {"f:spec": {}}, operation="Apply")]
    assert [ChildRef.of(live) for live in plan(make_service(), observed).deletes] == [ref]


def test_rendering_is_what_is_applied() -> None:
    service = make_service()
    wanted = render_children(service, engine_image="engine:1")
    made = plan(service, nothing())
    assert made.applies[1].manifest == wanted[SERVICE]


def entry(manager: str, fields: dict[str, Any], **more: Any) -> Manifest:
    return {"manager": manager, "operation": "Update", "fieldsV1": fields, **more}


def managed(*entries: Manifest) -> Manifest:
    ours = {"f:spec": {"f:ports": {"f:a": {}}}}
    fields = [entry("pagoda", ours, operation="Apply"), *entries]
    return {"metadata": {"resourceVersion": "7", "managedFields": fields}}


def test_what_others_set_is_taken_over_so_that_the_apply_removes_it() -> None:
    taken = take_over(managed(entry("kubectl-edit", {"f:spec": {"f:ports": {"f:b": {}}}})))
    assert taken is not None
    assert taken["resourceVersion"] == "7"
    (ours,) = taken["managedFields"]
    assert ours["manager"] == "pagoda"
    assert ours["fieldsV1"] == {"f:spec": {"f:ports": {"f:a": {}, "f:b": {}}}}


def test_annotations_status_and_replicas_of_others_are_left_alone() -> None:
    annotations = {"f:metadata": {"f:annotations": {".": {}, "f:x": {}}}}
    restart = {"f:spec": {"f:template": {"f:metadata": {"f:annotations": {"f:restartedAt": {}}}}}}
    assert take_over(managed(entry("someone", annotations))) is None
    labels = {"f:metadata": {"f:labels": {".": {}, "f:x": {}}}}
    assert take_over(managed(entry("someone", labels))) is None
    assert take_over(managed(entry("kubectl-rollout", restart))) is None
    assert take_over(managed(entry("kubectl", {"f:spec": {"f:replicas": {}}}))) is None
    secrets = {"f:secrets": {".": {}, "k:x": {}}, "f:imagePullSecrets": {"k:y": {}}}
    assert take_over(managed(entry("platform", secrets))) is None
    assert take_over(managed(entry("kcm", {"f:status": {"f:x": {}}}, subresource="status"))) is None


def test_the_mark_of_an_object_that_holds_what_is_left_alone_is_no_field_to_take() -> None:
    marked = {"f:metadata": {".": {}, "f:annotations": {"f:x": {}}}}
    assert take_over(managed(entry("someone", marked))) is None


def test_of_one_manager_only_what_is_ours_to_decide_is_taken() -> None:
    fields = {"f:spec": {"f:replicas": {}, "f:paused": {}}}
    taken = take_over(managed(entry("kubectl-edit", fields)))
    assert taken is not None
    kept, ours = taken["managedFields"]
    assert kept["fieldsV1"] == {"f:spec": {"f:replicas": {}}}
    assert ours["fieldsV1"]["f:spec"] == {"f:ports": {"f:a": {}}, "f:paused": {}}


def test_what_an_apply_put_back_is_told_apart_from_another_strategy_of_its_own() -> None:
    """`kubectl rollout restart` of pods without room: an annotation stays, the strategy changes."""
    surge = {"metadata": {}, "spec": {"strategy": "Surge", "template": {"restarted": "now"}}}
    in_place = {"metadata": {}, "spec": {"strategy": "InPlace", "template": {"restarted": "now"}}}
    edited = {"metadata": {}, "spec": {"strategy": "Surge", "template": {"restarted": "never"}}}
    last = Applied.of(surge, surge)
    assert not is_put_back(last, surge, surge, surge)
    assert not is_put_back(last, in_place, surge, in_place)
    assert is_put_back(last, in_place, edited, in_place)
    assert is_put_back(last, surge, in_place, surge)
