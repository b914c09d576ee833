"""Each invariant finds what breaks it: else the bench would prove nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from faults.oracles import find_violations
from faults.plan import Request, read_event, read_request

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
    """method, path, body, what was answered; the method TOLD is an event of a watch."""
    record: list[Request] = []
    told: list[Request] = []
    for number, (method, path, body, answered) in enumerate(requests):
        if method == "TOLD":
            found = read_event(float(number), "llmservices", json.dumps(body).encode())
            assert found is not None
            told.append(found)
            continue
        found = read_request(len(record), float(number), method, path, body)
        found.retry_after_seconds = answered.pop("retry_after", 0.0)
        found.answer = answered
        record.append(found)
    return find_violations(record, "team", ["chat"], log, told)


def event(version: int, generation: int) -> tuple[str, str, Any, dict[str, Any]]:
    metadata = {"name": "chat", "namespace": "team", "uid": "u"}
    metadata |= {"resourceVersion": str(version), "generation": generation}
    return ("TOLD", "", {"type": "MODIFIED", "object": {"metadata": metadata}}, {})


READ = ("GET", CUSTOM, None)
TELL = f"{CUSTOM}/status?force=true"


def test_a_pass_that_does_all_as_it_should_breaks_nothing() -> None:
    assert not violations(
        (*READ, answer(1, replicas=2)),
        ("PATCH", f"{DEPLOYMENT}?force=true", {"spec": {"replicas": 2}}, {}),
        ("PATCH", TELL, status(True, 1), answer(2)),
        ("DELETE", DEPLOYMENT, UID, {}),
    )


def test_what_a_watch_told_need_not_be_read() -> None:
    ready = ("PATCH", TELL, status(True, 2), answer(7, 2))
    assert not violations(event(5, 2), ready)
    # It was told while the pass was under way.
    assert not violations(event(4, 2), event(5, 3), ready)
    assert violations(event(4, 1), ready)
    assert violations(event(4, 3), ("PATCH", TELL, status(False, 3), answer(6, 3)), ready)
    # An old one, told again.
    assert violations(
        event(5, 3), ("PATCH", TELL, status(False, 3), answer(6, 3)), event(4, 2), ready
    )
    assert violations(event(7, 2), ready)


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
        ("was known", [(*READ, answer(1, 2)), ("PATCH", TELL, status(True, 1), answer(2, 2))]),
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
