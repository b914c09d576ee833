"""Each invariant finds what breaks it: else the bench would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
from faults.oracles import find_violations
from faults.plan import Request, read_request

CUSTOM = "/apis/pagoda.dev/v1alpha1/namespaces/team/llmservices/chat"
DEPLOYMENT = "/apis/apps/v1/namespaces/team/deployments/chat-engine"
UID = {"preconditions": {"uid": "u"}}


def status(ready: bool, generation: int) -> dict[str, Any]:
    condition = {"type": "Ready", "status": str(ready), "observedGeneration": generation}
    return {"status": {"conditions": [condition]}}


def answer(version: int, generation: int = 1, replicas: int = 1) -> dict[str, Any]:
    spec = {"replicas": replicas}
    return {"resourceVersion": str(version), "generation": generation, "spec": spec}


def violations(*requests: tuple[str, str, Any, dict[str, Any]], log: str = "") -> list[str]:
    """method, path, body, what was answered."""
    record: list[Request] = []
    for number, (method, path, body, answered) in enumerate(requests):
        found = read_request(number, float(number), method, path, body)
        found.retry_after_seconds = answered.pop("retry_after", 0.0)
        found.answer = answered
        record.append(found)
    return find_violations(record, "team", ["chat"], log)


READ = ("GET", CUSTOM, None)
TELL = f"{CUSTOM}/status?force=true"


def test_a_pass_that_does_all_as_it_should_breaks_nothing() -> None:
    assert not violations(
        (*READ, answer(1, replicas=2)),
        ("PATCH", f"{DEPLOYMENT}?force=true", {"spec": {"replicas": 2}}, {}),
        ("PATCH", TELL, status(True, 1), answer(2)),
        ("DELETE", DEPLOYMENT, UID, {}),
    )


def test_another_object_of_the_kind_need_not_wait_for_what_one_was_asked_to() -> None:
    events = "/apis/events.k8s.io/v1/namespaces/team/events"
    named = [{"metadata": {"name": f"chat.{it}"}, "regarding": {"name": "chat"}} for it in "ab"]
    first, other = (("POST", events, body) for body in named)
    assert not violations((*first, {"retry_after": 2.0}), (*other, {}))
    assert violations((*first, {"retry_after": 2.0}), (*first, {}))


@pytest.mark.parametrize(
    ("words", "requests"),
    [
        ("not owned", [("DELETE", "/api/v1/namespaces/team/services/other", UID, {})]),
        ("not owned", [("DELETE", DEPLOYMENT.replace("team", "x"), UID, {})]),
        ("without a uid", [("DELETE", DEPLOYMENT, {}, {})]),
        ("was read", [(*READ, answer(1, 2)), ("PATCH", TELL, status(True, 1), answer(2, 2))]),
        ("already", [(*READ, answer(1)), ("PATCH", TELL, status(False, 1), answer(1))]),
        ("were asked for", [("GET", CUSTOM, None, {"retry_after": 2.0}), (*READ, answer(1))]),
        (
            "out of",
            [
                (*READ, answer(1, replicas=2)),
                ("PATCH", f"{DEPLOYMENT}?force=true", {"spec": {"replicas": 3}}, {}),
            ],
        ),
    ],
)
def test_what_must_not_be_is_found(words: str, requests: list[Any]) -> None:
    (found,) = violations(*requests)
    assert words in found


def test_a_traceback_in_the_log_is_found() -> None:
    assert violations(log="Traceback (most recent call last)") == ["the log has a traceback"]
