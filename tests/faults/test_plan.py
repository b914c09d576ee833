from __future__ import annotations

from typing import Any

import pytest
from faults.plan import Request, Shot, WatchFault, read_request

CUSTOM = "/apis/pagoda.dev/v1alpha1/namespaces/team/llmservices"


def request(method: str, path: str, body: Any = None) -> Request:
    return read_request(0, 0.0, method, path, body)


@pytest.mark.parametrize(
    ("method", "path", "verb", "service"),
    [
        ("GET", f"{CUSTOM}/chat", "get", "chat"),
        ("PATCH", f"{CUSTOM}/chat/status?fieldManager=pagoda&force=true", "apply", "chat"),
        ("GET", f"{CUSTOM}?watch=true&resourceVersion=7", "watch", ""),
        ("GET", CUSTOM, "list", ""),
        ("GET", "/apis/apps/v1/namespaces/team/deployments/chat-engine", "get", "chat"),
        ("DELETE", "/api/v1/namespaces/team/pods/chat-engine-5f-x7", "delete", "chat"),
        (
            "GET",
            "/api/v1/namespaces/team/pods?labelSelector=pagoda.dev%2Fservice%3Dchat",
            "list",
            "chat",
        ),
        (
            "GET",
            "/api/v1/namespaces/team/events?fieldSelector=involvedObject.name%3Dchat-engine-5f",
            "list",
            "chat",
        ),
        (
            "PUT",
            "/apis/coordination.k8s.io/v1/namespaces/team/leases/pagoda-operator",
            "update",
            "",
        ),
        ("GET", "/apis", "list", ""),
    ],
)
def test_a_request_tells_what_it_does_and_of_which_service(
    method: str, path: str, verb: str, service: str
) -> None:
    found = request(method, path)
    assert (found.verb, found.service) == (verb, service)


def test_a_status_is_told_apart_from_its_object() -> None:
    found = request("PATCH", f"{CUSTOM}/chat/status?force=true")
    assert found.target == ("apply", "llmservices", "status")
    assert found.namespace == "team"


def test_a_shot_fires_once_at_the_request_that_it_counts_to() -> None:
    shot = Shot(matches=lambda it: it.is_write, nth=2, kind="503")
    write, read = request("DELETE", f"{CUSTOM}/chat"), request("GET", f"{CUSTOM}/chat")
    assert [shot.take(it) for it in (write, read, write, write)] == [False, False, True, False]
    assert shot.fired is write


def test_a_fault_of_one_event_leaves_the_others_alone() -> None:
    fault = WatchFault(resource="pods", kind="drop", event="DELETED", name="a")
    events = [
        {"type": kind, "object": {"metadata": {"name": name}}}
        for kind, name in (("DELETED", "b"), ("ADDED", "a"), ("DELETED", "a"))
    ]
    assert [fault.concerns("pods", event) for event in events] == [False, False, True]
    assert not fault.concerns("services", events[2])
    fault.is_over = True
    assert not fault.concerns("pods", events[2])
