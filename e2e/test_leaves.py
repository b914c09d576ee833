"""Every leaf of the CRD on a real API server: what it takes, children of services can have; there
and back again leaves them as they were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import leaves
import pytest
import stack
from api import Api, Refusal
from audit import AuditLog
from kube import Kubectl, condition, wait_until
from operator_process import OperatorProcess
from services import manifest

from pagoda_operator.names import CHILD_KINDS, digest
from pagoda_operator.render import render_children
from pagoda_operator.spec import parse

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
SCHEMA = leaves.load_schema(stack.ROOT / "crds" / "llmservice.yaml")
MUTATIONS = list(leaves.mutate(SCHEMA))
FIELDS = sorted(SCHEMA["properties"])
# Of a Deployment, set by its controller.
KEPT = ("spec", "automountServiceAccountToken")


def try_service(api: Api, spec: dict[str, Any]) -> dict[str, Any]:
    service = {**manifest(), "spec": spec}
    return api.create(service, is_dry_run=True)


@pytest.mark.parametrize("field", FIELDS)
def test_what_a_leaf_takes_the_children_take_and_the_rest_is_refused_by_name(
    api: Api, field: str
) -> None:
    seen: set[str] = set()
    mutations = [it for it in MUTATIONS if it.leaf.path[:1] == (field,)]
    wrong = [text for mutation in mutations for text in find_faults(api, mutation, seen)]
    print(f"{field}: {len(mutations)} values, {len(seen)} children")
    assert mutations
    assert not wrong, "\n".join(wrong)


def find_faults(api: Api, mutation: leaves.Mutation, seen: set[str]) -> Iterator[str]:
    """What the API server should have said otherwise.

    Args:
        seen: digests of children that it took.
    """
    try:
        service = try_service(api, mutation.spec)
    except Refusal as error:
        if mutation.is_valid:
            yield f"{mutation} is refused: {error}"
        name = next((step for step in reversed(mutation.leaf.path) if step.isalpha()), "spec")
        if name not in str(error):
            yield f"{mutation} is refused without its name: {error}"
        return
    if mutation.is_valid is False:
        yield f"{mutation} is taken"
        return
    for child in render_children(parse(service), engine_image="engine:1").values():
        # Another one in each answer.
        child["metadata"]["ownerReferences"][0]["uid"] = "uid"
        if (found := digest(child)) not in seen:
            seen.add(found)
            try:
                api.create(child, is_dry_run=True)
            except Refusal as error:
                yield f"{mutation} is taken, and then its {child['kind']} is refused: {error}"


def test_there_and_back_again_leaves_every_child_as_it_was(
    api: Api, namespace: Kubectl, operator: OperatorProcess, audit_log: AuditLog
) -> None:
    def is_taken(spec: dict[str, Any]) -> bool:
        try:
            return bool(try_service(api, spec))
        except Refusal:
            return False

    specs = leaves.combine(SCHEMA, is_taken)
    print(f"{len(specs)} specs have every leaf")
    first = children_of(namespace, operator, {"suspend": True})
    for spec in specs:
        assert children_of(namespace, operator, spec) != first
        assert children_of(namespace, operator, {"suspend": True}) == first
    assert "Traceback" not in operator.log
    assert_quiet(namespace, audit_log)


def children_of(kubectl: Kubectl, operator: OperatorProcess, spec: dict[str, Any]) -> str:
    """The children once the spec is in force: what the operator decides of them, byte for byte."""
    kubectl.apply(manifest(**spec))
    before = ""

    def settled() -> str:
        nonlocal before
        service = kubectl.get("llmservice", "chat") or {}
        is_seen = service["status"].get("observedGeneration") == service["metadata"]["generation"]
        kinds = ",".join(f"{kind.lower()}" for kind in CHILD_KINDS)
        found = [
            {
                "kind": child["kind"],
                "name": child["metadata"]["name"],
                "labels": child["metadata"]["labels"],
                "owners": child["metadata"]["ownerReferences"],
                **{key: child.get(key) for key in KEPT},
            }
            for child in kubectl.items(kinds, "-l", "app.kubernetes.io/managed-by=pagoda")
        ]
        now = json.dumps(found, sort_keys=True)
        # A Service's addresses and a Job's selector are the cluster's, and go with the object.
        before, is_same = now, now == before
        return now if is_same and is_seen else ""

    return wait_until(
        "children that stay as they are",
        settled,
        interval_seconds=0.7,
        on_timeout=lambda: operator.log[-4000:],
    )


ODD_SPECS: dict[str, dict[str, Any]] = {
    "letters of every script": {"podTemplate": {"annotations": {"a": "鑑🏯\u202e\u0000 Ä" * 900}}},
    "almost as much as an object may hold": {
        "podTemplate": {"env": [{"name": f"A{n}", "value": "x" * 32768} for n in range(47)]}
    },
}


@pytest.mark.parametrize("case", ODD_SPECS)
def test_an_odd_spec_is_refused_or_comes_to_rest_with_a_status(
    api: Api, namespace: Kubectl, operator: OperatorProcess, audit_log: AuditLog, case: str
) -> None:
    service = manifest(**ODD_SPECS[case])
    service["metadata"]["namespace"] = namespace.namespace
    try:
        api.create(service)
    except Refusal as error:
        print(f"refused: {str(error)[:300]}")
        return

    def reason() -> str:
        found = namespace.get("llmservice", "chat") or {}
        return str(condition(found, "Ready").get("reason", ""))

    wait_until("a reason", reason, on_timeout=lambda: operator.log[-4000:])
    time.sleep(2)
    found = condition(namespace.get("llmservice", "chat") or {}, "Ready")
    print(f"{found['reason']}: {found['message'][:300]}")
    assert "Traceback" not in operator.log
    assert_quiet(namespace, audit_log)


def assert_quiet(kubectl: Kubectl, audit_log: AuditLog) -> None:
    """In three seconds the operator writes at most twice: it does not try again at once."""

    def count() -> int:
        requests = audit_log.requests(kubectl.namespace)
        return sum(it.is_by_operator and it.resource != "leases" for it in requests)

    before = count()
    time.sleep(3)
    assert count() - before <= 2
