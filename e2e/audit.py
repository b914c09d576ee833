"""The audit log of the local cluster's API server: who asked for what, and when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

READS = ("get", "list", "watch")


@dataclass(frozen=True, slots=True)
class Request:
    """One finished request."""

    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    user_agent: str
    user: str
    status: int
    is_denied: bool
    finished: datetime

    @property
    def is_write(self) -> bool:
        return self.verb not in READS

    @property
    def is_by_operator(self) -> bool:
        return self.user_agent.startswith(("pagoda-operator", "kopf"))


class AuditLog:
    """What is appended to the log after this object was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size

    def requests(self, namespace: str, *, with_reads: bool = False) -> list[Request]:
        """The requests for objects of a namespace, in the order in which they finished.

        Reads are there of those that ask by a service account.
        """
        return [
            request
            for request in self.read()
            if request.namespace == namespace and (request.is_write or with_reads)
        ]

    def requests_of_account(self, name: str) -> list[Request]:
        """Those for objects by service accounts of the name, whatever their namespace."""
        return [
            request
            for request in self.read(f":{name}".encode())
            if request.resource and request.user.startswith("system:serviceaccount:")
        ]

    def read(self, word: bytes = b"") -> list[Request]:
        """What is finished, of the lines with the word."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            lines = [line for line in file if word in line and line.endswith(b"\n")]
        entries = map(json.loads, lines)
        return [_parse(entry) for entry in entries if entry["stage"] == "ResponseComplete"]


def _parse(entry: dict[str, Any]) -> Request:
    reference = entry.get("objectRef", {})
    return Request(
        verb=entry["verb"],
        group=reference.get("apiGroup", ""),
        resource=reference.get("resource", ""),
        subresource=reference.get("subresource", ""),
        namespace=reference.get("namespace", ""),
        name=reference.get("name", ""),
        user_agent=entry.get("userAgent", ""),
        user=entry["user"]["username"],
        status=entry.get("responseStatus", {}).get("code", 0),
        is_denied=entry.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid",
        finished=datetime.fromisoformat(entry["stageTimestamp"]),
    )
