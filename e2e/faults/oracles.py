"""What must hold of the record of every run, whatever failed in it. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from faults.plan import Request

LEASE = "pagoda-operator"
# A request is stamped when it has arrived, which is later than it was sent.
TOLERANCE_SECONDS = 0.05


def find_violations(
    record: Sequence[Request],
    namespace: str,
    services: Collection[str],
    log: str,
    told: Sequence[Request] = (),
) -> list[str]:
    """What an operator of this namespace must not have done.

    Args:
        record: all requests of the operator, in the order in which they arrived.
        services: the names of all LLMServices that there were.
        told: what its watches told of them, in order (`plan.read_event`).
    """
    found = list(_foreign_writes(record, namespace, frozenset(services)))
    found += _deletes_without_uid(record)
    found += _early_retries(record)
    by_service: dict[str, list[Request]] = {}
    for request in heapq.merge(record, told, key=lambda it: it.at):
        by_service.setdefault(request.service, []).append(request)
    for requests in by_service.values():
        found += _claims_and_repetitions(requests)
    found += ["the log has a traceback"] if "Traceback" in log else []
    return found


def _foreign_writes(
    record: Sequence[Request], namespace: str, services: frozenset[str]
) -> Iterator[str]:
    for request in record:
        if not request.is_write:
            continue
        name, service = request.name, request.service
        is_ours = service in services and (
            name in (service, f"{service}-engine")
            or (request.resource == "events" and name.startswith(f"{service}."))
        )
        is_lease = request.is_lease and name == LEASE
        if request.namespace != namespace or not (is_ours or is_lease):
            yield f"{request} in {request.namespace}: a write to what is not owned"


def _deletes_without_uid(record: Sequence[Request]) -> list[str]:
    return [
        f"{request}: without a uid as precondition"
        for request in record
        if request.verb == "delete"
        and not ((request.body or {}).get("preconditions") or {}).get("uid")
    ]


def _early_retries(record: Sequence[Request]) -> Iterator[str]:
    for asked in record:
        if not asked.retry_after_seconds:
            continue
        later = itertools.islice(record, asked.number + 1, None)
        again = next((it for it in later if _is_same(it, asked)), None)
        if again is None:
            continue
        pause = again.at - asked.at
        if pause < asked.retry_after_seconds - TOLERANCE_SECONDS:
            yield f"{again}: after {pause:.2f} s; {asked.retry_after_seconds:.0f} s were asked for"


def _is_same(request: Request, other: Request) -> bool:
    """All objects of a kind are created at one path."""
    same = (request.method, request.path, request.name)
    return same == (other.method, other.path, other.name)


def _claims_and_repetitions(requests: Sequence[Request]) -> Iterator[str]:
    """Of one service: what its status claims, and whether a write changed anything."""
    seen: dict[str, Any] = {}
    # A pass knows what was known when the last one ended, or what was told since then.
    generations: set[int] = set()
    replicas = {1}
    for request in requests:
        if request.resource == "deployments" and request.verb == "apply":
            told = (request.body or {})["spec"].get("replicas")
            if told is not None and not min(replicas) <= told <= max(replicas):
                yield f"{request}: {told} replicas, out of {sorted(replicas)}"
        if request.resource == "llmservices" and request.subresource == "status":
            if request.verb == "apply":
                yield from _check_status(request, seen, generations)
            generations = {seen["generation"]} if seen else set()
        if request.answer and _version(request.answer) >= _version(seen):
            seen = request.answer
            generations.add(seen["generation"])
            replicas.add(seen["spec"].get("replicas", 1))


def _version(answer: dict[str, Any]) -> int:
    return int(answer.get("resourceVersion", 0))


def _check_status(
    request: Request, seen: dict[str, Any], generations: Collection[int]
) -> Iterator[str]:
    status = (request.body or {})["status"]
    conditions = {it["type"]: it for it in status["conditions"]}
    claimed = conditions["Ready"]["observedGeneration"]
    if conditions["Ready"]["status"] == "True" and claimed not in generations:
        yield f"{request}: Ready of generation {claimed}, {sorted(generations)} was known"
    if request.answer and request.answer["resourceVersion"] == seen.get("resourceVersion"):
        yield f"{request}: a status that was there already"
