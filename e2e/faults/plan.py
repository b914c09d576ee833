"""Which request fails how. Pure: the proxy does what this says.

Requests are numbered by the proxy. A `Shot` fires once, at the n-th request that it matches; a
`WatchFault` changes what comes through watches until it is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

RETRY_AFTER_SECONDS = 2
ErrorKind = Literal[
    "409",
    "410",
    "422",
    "429",
    "500",
    "503",
    "504",
    "reset before",
    "reset after",
    "hang",
    "bad JSON",
]
ERROR_KINDS: tuple[ErrorKind, ...] = ErrorKind.__args__  # type: ignore[attr-defined]
FaultKind = Literal[ErrorKind, "kill before", "kill after", "delay"]
# A gateway gives up on what may have been done.
FORWARDED = ("504", "reset after", "bad JSON", "kill after", "delay")
WRITES = ("create", "update", "patch", "apply", "delete")
Target = tuple[str, str, str]
"""verb, resource, subresource"""
_VERBS = {"POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}


@dataclass(slots=True, kw_only=True)
class Request:
    """One request of an operator, and how it was answered."""

    number: int
    at: float
    method: str
    path: str
    verb: str
    resource: str
    subresource: str
    namespace: str
    name: str
    service: str
    """The LLMService that it is about, as far as the request itself tells."""
    body: dict[str, Any] | None = None
    fault: str = ""
    status: int = 0
    """0: no answer."""
    retry_after_seconds: float = 0.0
    answer: dict[str, Any] = field(default_factory=dict)
    """Of LLMServices: uid, resourceVersion and generation of the answer."""

    @property
    def is_write(self) -> bool:
        return self.verb in WRITES

    @property
    def is_lease(self) -> bool:
        return self.resource == "leases"

    @property
    def target(self) -> Target:
        return self.verb, self.resource, self.subresource

    def __str__(self) -> str:
        what = "/".join(filter(None, (self.resource, self.name, self.subresource)))
        return f"#{self.number} {self.verb} {what}"


def read_request(number: int, at: float, method: str, raw_path: str, body: Any) -> Request:
    """What a request is about; paths as Kubernetes has them."""
    path, _, query_text = raw_path.partition("?")
    query = {key: values[0] for key, values in parse_qs(query_text).items()}
    parts = [unquote(part) for part in path.strip("/").split("/")]
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if len(parts) > 1 and parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    resource, name, subresource = (*parts, "", "", "")[:3]
    verb = _VERBS.get(method) or ("get" if name else "list")
    if method == "GET" and "watch" in query:
        verb = "watch"
    if method == "PATCH" and "force" in query:
        verb = "apply"
    if verb == "create":
        name = (body or {}).get("metadata", {}).get("name", "")
    labels = dict(
        part.split("=", 1) for part in query.get("labelSelector", "").split(",") if "=" in part
    )
    # A list of events names a pod, as `chat-engine-5d8f-x2x`.
    named = name or query.get("fieldSelector", "").partition("involvedObject.name=")[2]
    service = labels.get("pagoda.dev/service") or named.partition("-engine")[0]
    if resource in ("leases", ""):
        service = ""
    if resource == "events" and verb == "create":
        service = (body or {}).get("regarding", {}).get("name", "")
    return Request(
        number=number,
        at=at,
        method=method,
        path=raw_path,
        verb=verb,
        resource=resource,
        subresource=subresource,
        namespace=namespace,
        name=name,
        service=service,
        body=body,
    )


def read_event(at: float, resource: str, line: bytes) -> Request | None:
    """What a watch told of an LLMService; None if it is of anything else, or gone."""
    if resource != "llmservices":
        return None
    event = json.loads(line)
    if event["type"] not in ("ADDED", "MODIFIED"):
        return None
    found = event["object"]
    metadata = found["metadata"]
    return Request(
        number=-1,
        at=at,
        method="",
        path="",
        verb="told",
        resource=resource,
        subresource="",
        namespace=metadata["namespace"],
        name=metadata["name"],
        service=metadata["name"],
        answer=answer_of(found),
    )


def answer_of(found: dict[str, Any]) -> dict[str, Any]:
    """What the oracles ask of an LLMService."""
    keys = ("uid", "resourceVersion", "generation")
    return {key: found["metadata"][key] for key in keys} | {"spec": found.get("spec", {})}


@dataclass(slots=True, kw_only=True)
class Shot:
    """One fault, at the n-th request (from 1) that matches."""

    matches: Callable[[Request], bool]
    nth: int
    kind: FaultKind
    seen: int = 0
    fired: Request | None = None
    over_at: float = 0.0
    """When the fault had done what it does."""

    def take(self, request: Request) -> bool:
        """Whether this is the request."""
        if self.fired is not None or not self.matches(request):
            return False
        self.seen += 1
        if self.seen != self.nth:
            return False
        self.fired = request
        return True


WatchKind = Literal["freeze", "drop", "duplicate", "delay", "replay", "error 410", "error 500"]


@dataclass(slots=True, kw_only=True)
class WatchFault:
    """What becomes of the events of a resource's watches.

    event: the type of the one event that is meant, of the object `name`; None: all of them.
    """

    resource: str
    kind: WatchKind
    event: str | None = None
    name: str = ""
    seconds: float = 0.0
    is_over: bool = False
    fired: int = 0
    until: float = 0.0
    """When the delay that is under way ends."""

    def concerns(self, resource: str, event: dict[str, Any]) -> bool:
        if self.is_over or resource != self.resource:
            return False
        if self.event is None:
            return True
        name = event["object"].get("metadata", {}).get("name", "")
        return bool(event["type"] == self.event and name == self.name)


def status_body(code: int) -> dict[str, Any]:
    """An error as an API server words it."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": f"injected {code}",
        "reason": "Injected",
        "code": code,
    }
