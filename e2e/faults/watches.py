"""R4: watches that freeze, lose, repeat or delay events, end with an error, or show the past."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from faults.api import path_of
from faults.bench import CONVERGE_SECONDS, Bench, Outcome
from faults.operators import WATCHED, Operator
from faults.plan import WatchFault, WatchKind
from faults.scenarios import SCENARIOS, Case, Scenario
from faults.world import wait_until

NOTICED_SECONDS = 75.0
RESYNC_SECONDS = 20.0
# After the resync, the queue has to come to it.
HEALED_SECONDS = RESYNC_SECONDS + 5.0
STALE_SECONDS = 3.0
LIMIT_SECONDS = 30.0


async def run_watches(
    bench: Bench, scenarios: Sequence[Scenario] = SCENARIOS, *, is_sample: bool = False
) -> tuple[list[Outcome], list[str]]:
    """All of them at the same time; a sample leaves out those that take minutes."""
    await bench.refer(scenarios)
    parts = [
        _run_missed(bench, with_ends=not is_sample),
        _run_under(bench, scenarios, "duplicate"),
        _run_under(bench, scenarios, "delay"),
        _run_under(bench, scenarios, "replay"),
        _run_stale_restart(bench),
    ]
    parts += [] if is_sample else [_run_freeze(bench)]
    found = await asyncio.gather(*parts)
    return [it for outcomes, _ in found for it in outcomes], [
        it for _, violations in found for it in violations
    ]


@contextmanager
def _planned(operator: Operator, *faults: WatchFault) -> Iterator[None]:
    operator.proxy.watch_faults.extend(faults)
    try:
        yield
    finally:
        for fault in faults:
            operator.proxy.watch_faults.remove(fault)


async def _run_freeze(bench: Bench) -> tuple[list[Outcome], list[str]]:
    """Every stream stands still, with its connection open."""
    outcomes = []
    async with bench.operator("freeze") as operator:
        case = bench.case(operator.namespace, "z")
        await case.create()
        await case.until_ready()
        await asyncio.sleep(2.0)
        faults = [WatchFault(resource=it, kind="freeze") for it in sorted(WATCHED)]
        first, frozen = len(operator.proxy.record), time.monotonic()
        with _planned(operator, *faults):
            await case.edit(engine={"maxNumSeqs": 7})
            await case.delete("Service")
            await asyncio.sleep(NOTICED_SECONDS + 10)
        for fault in faults:
            again = [
                it.at
                for it in operator.proxy.record[first:]
                if it.verb == "watch" and it.resource == fault.resource
            ]
            outcome = Outcome(scenario="any", fault="freeze", point=fault.resource)
            outcome.seconds = round(min(again, default=frozen + 999) - frozen, 2)
            outcome.is_late = outcome.seconds > NOTICED_SECONDS
            outcomes.append(outcome)
        if not (case.front and "--max-num-seqs 7 " in case.arguments):
            outcomes[0].problems.append("what was missed is not made up for")
        return outcomes, bench.audit(operator)


MISSED: tuple[tuple[str, str, str, str], ...] = (
    ("llmservices", "ADDED", "", "create"),
    ("llmservices", "MODIFIED", "", "edit"),
    ("llmservices", "DELETED", "", "delete"),
    ("services", "DELETED", "", "delete Service"),
    ("services", "MODIFIED", "", "edit Service"),
    ("serviceaccounts", "DELETED", "-engine", "delete ServiceAccount"),
    ("deployments", "DELETED", "-engine", "delete Deployment"),
    ("deployments", "MODIFIED", "-engine", "edit Deployment"),
)
"""resource, the event that is missed, the end of the object's name, what the user does"""


async def _run_missed(bench: Bench, *, with_ends: bool) -> tuple[list[Outcome], list[str]]:
    """One event never comes, or an error and a relist come in its place."""
    async with bench.operator("missed", resync_seconds=RESYNC_SECONDS) as operator:
        outcomes = list(
            await asyncio.gather(*(_miss(bench, operator, *row, "drop") for row in MISSED))
        )
        # A relist that one run causes would swallow the event that another waits for.
        for row in MISSED:
            outcomes.append(await _miss(bench, operator, *row, "error 410"))
        # It ends the operator, and so every other run.
        for row in MISSED if with_ends else ():
            outcomes.append(await _miss(bench, operator, *row, "error 500"))
            await operator.wait_ready()
        return outcomes, bench.audit(operator)


async def _miss(
    bench: Bench,
    operator: Operator,
    resource: str,
    event: str,
    suffix: str,
    action: str,
    kind: WatchKind,
) -> Outcome:
    case = bench.case(operator.namespace, "m")
    outcome = Outcome(scenario=action, fault=kind, point=f"{resource} {event}")
    if action != "create":
        await case.create()
        await case.until_ready()
        await asyncio.sleep(2.0)
    fault = WatchFault(resource=resource, kind=kind, event=event, name=f"{case.name}{suffix}")
    lives = len(operator.lives)
    with _planned(operator, fault):
        await _act(case, action)
        acted = time.monotonic()
        try:
            healed = await wait_until(lambda: _is_healed(case, action), CONVERGE_SECONDS, action)
            outcome.seconds = round(healed - acted, 2)
            outcome.is_late = outcome.seconds > HEALED_SECONDS
            await wait_until(lambda: fault.fired, 5.0, f"{event} of {resource} {case.name}")
        except TimeoutError as error:
            outcome.problems.append(str(error))
    outcome.is_reached = bool(fault.fired)
    outcome.restarts = len(operator.lives) - lives
    if action == "delete":
        outcome.problems += await _find_ghost(operator, case)
    outcome.show()
    return outcome


async def _act(case: Case, action: str) -> None:
    match action:
        case "create":
            await case.create()
        case "edit":
            await case.edit(engine={"maxNumSeqs": 7})
        case "delete":
            await case.delete()
        case "edit Service":
            ports = [{"name": "http", "port": 81, "protocol": "TCP", "targetPort": 1}]
            await case.patch("Service", case.name, {"spec": {"ports": ports}})
        case "edit Deployment":
            patch = {"spec": {"revisionHistoryLimit": 7}}
            await case.patch("Deployment", case.engine, patch)
        case _:
            kind = action.removeprefix("delete ")
            await case.delete(kind, case.name if kind == "Service" else case.engine)


def _is_healed(case: Case, action: str) -> bool:
    if action == "delete":
        return not case.service and not case.world.of_service(case.namespace, case.name)
    account = case.world.get("ServiceAccount", case.namespace, case.engine)
    if not (case.front and case.deployment and account and case.says("Ready")):
        return False
    is_set = action != "edit" or "--max-num-seqs 7 " in case.arguments
    ports = case.front["spec"]["ports"]
    history = case.deployment["spec"]["revisionHistoryLimit"]
    return is_set and ports[0]["port"] == 80 and history == 3


async def _find_ghost(operator: Operator, case: Case) -> list[str]:
    """Work for a service that is gone, after the resync that had to show it."""
    await asyncio.sleep(2 * RESYNC_SECONDS)
    first = len(operator.proxy.record)
    await asyncio.sleep(RESYNC_SECONDS + 5.0)
    late = operator.proxy.of_service(case.name, first)
    return [f"{it}: of a service that is gone" for it in late]


async def _run_under(
    bench: Bench, scenarios: Sequence[Scenario], kind: WatchKind
) -> tuple[list[Outcome], list[str]]:
    """Every scenario, while all events are repeated, delayed or followed by old ones."""
    async with bench.operator(f"under-{kind}") as operator:
        faults = [
            WatchFault(resource=it, kind=kind, seconds=STALE_SECONDS) for it in sorted(WATCHED)
        ]
        with _planned(operator, *faults):
            outcomes = await asyncio.gather(
                *(_run_one(bench, operator, scenario, kind) for scenario in scenarios)
            )
        return list(outcomes), bench.audit(operator)


async def _run_one(
    bench: Bench, operator: Operator, scenario: Scenario, kind: WatchKind
) -> Outcome:
    outcome = await bench.run(operator, scenario, None, kind, LIMIT_SECONDS)
    outcome.fault, outcome.point = kind, "all events"
    return outcome


async def _run_stale_restart(bench: Bench) -> tuple[list[Outcome], list[str]]:
    """A new process sees a list from before an edit, a deletion and a new object of old name."""
    outcome = Outcome(scenario="restart", fault="stale list", point="llmservices")
    async with bench.operator("stale") as operator:
        edited, gone, anew = (bench.case(operator.namespace, "l") for _ in range(3))
        cases = (edited, gone, anew)
        for case in cases:
            await case.create()
        for case in cases:
            await case.until_ready()
        old = json.dumps(
            await bench.api.request("GET", path_of("LLMService", operator.namespace))
        ).encode()
        await edited.edit(engine={"maxNumSeqs": 7})
        await gone.delete()
        await anew.delete()
        await anew.create(engine={"maxNumSeqs": 9})
        await anew.until("anew", lambda: "--max-num-seqs 9 " in anew.arguments)
        for case in (edited, anew):
            await case.until_ready()
        await asyncio.sleep(3.0)
        operator.proxy.stale_lists["llmservices"] = [old, old]
        operator.kill()
        await asyncio.sleep(1.0)
        await operator.wait_ready()
        await asyncio.sleep(10.0)
        record = operator.proxy.record[operator.lives[-1].first_request :]
        outcome.is_reached = not operator.proxy.stale_lists["llmservices"]
        outcome.problems += [f"{it}: on stale data" for it in record if it.verb == "delete"]
        if bench.world.of_service(gone.namespace, gone.name):
            outcome.problems.append("children of a deleted service are back")
        for case in (edited, anew):
            if not case.says("Ready") or bench.world.num_pods_made(*_key(case)) != 2:
                outcome.problems.append(f"{case.name} did not stay as it was")
        return [outcome], bench.audit(operator)


def _key(case: Case) -> tuple[str, str]:
    return case.namespace, case.name
