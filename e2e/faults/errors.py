"""R2: every kind of error at every write, at the first read of each kind, and at the start."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from faults.bench import CONVERGE_SECONDS, Bench, Outcome, writes_of
from faults.operators import Operator
from faults.plan import ERROR_KINDS, ErrorKind, Request, Shot, Target
from faults.scenarios import SCENARIOS, Case, Scenario
from faults.world import wait_until

LIMIT_SECONDS = 30.0
# A watch that hangs is found out by its silence: see `watches.py`.
HUNG_WATCH_SECONDS = 75.0
NUM_AT_ONCE = 12
# A request that hangs holds one of the operator's eight workers for fifteen seconds.
NUM_HANGING = 3


async def run_errors(
    bench: Bench,
    scenarios: Sequence[Scenario] = SCENARIOS,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
) -> tuple[list[Outcome], list[str]]:
    """One operator, one service for each fault; many at once."""
    slots, hanging = asyncio.Semaphore(NUM_AT_ONCE), asyncio.Semaphore(NUM_HANGING)
    await bench.refer(scenarios)
    async with bench.operator("errors") as operator:

        async def run(scenario: Scenario, kind: ErrorKind, point: int | Target) -> Outcome:
            # Hanging ones wait for each other before they take a slot.
            async with hanging if kind == "hang" else slots:
                told = _tell(point)
                shoot = _shoot(point, kind)
                if bench.is_over:
                    return Outcome.left_out(scenario.name, kind, told)
                return await bench.run(operator, scenario, shoot, told, LIMIT_SECONDS)

        # Where time runs out, some of everything has run: one point of each scenario after another.
        points = ((it, point) for it in scenarios for point in enumerate(_points(bench, it)))
        ordered = sorted(points, key=lambda it: it[1][0])
        jobs = [run(scenario, kind, point) for scenario, (_, point) in ordered for kind in kinds]
        outcomes = await asyncio.gather(*jobs)
        return outcomes, bench.audit(operator)


def _points(bench: Bench, scenario: Scenario) -> list[int | Target]:
    reference = bench.references[scenario.name]
    return [*range(1, reference.num_writes + 1), *reference.first_reads]


def _tell(point: int | Target) -> str:
    return f"write {point}" if isinstance(point, int) else " ".join(filter(None, point))


def _shoot(point: int | Target, kind: ErrorKind) -> Callable[[str], Shot]:
    """The fault of the n-th write, or of the first read of this kind, of a service."""

    def shoot(service: str) -> Shot:
        if isinstance(point, int):
            return Shot(matches=writes_of(service), nth=point, kind=kind)
        return Shot(
            matches=lambda it: it.service == service and it.target == point, nth=1, kind=kind
        )

    return shoot


async def run_start_errors(
    bench: Bench, kinds: Sequence[ErrorKind] = ERROR_KINDS, num_operators: int = 4
) -> tuple[list[Outcome], list[str]]:
    """Each request with which an operator starts fails once, in each way."""
    outcomes: list[Outcome] = []
    jobs: asyncio.Queue[tuple[Target, int, ErrorKind]] = asyncio.Queue()
    async with AsyncExitStack() as running:
        operators = [
            await running.enter_async_context(bench.operator(f"starts-{number}"))
            for number in range(num_operators)
        ]
        cases = [bench.case(it.namespace, "s") for it in operators]
        for case in cases:
            await case.create()
        await asyncio.sleep(1.0)
        first = operators[0].proxy.record[: _end_of_start(operators[0])]
        counts = Counter(it.target for it in first if not it.service)
        for target, count in sorted(counts.items()):
            for nth in range(1, count + 1):
                for kind in kinds:
                    jobs.put_nowait((target, nth, kind))
        works = (
            _start_again(bench, operator, case, jobs, outcomes)
            for operator, case in zip(operators, cases, strict=True)
        )
        await asyncio.gather(*works)
        violations = [it for operator in operators for it in bench.audit(operator)]
    return outcomes, violations


def _end_of_start(operator: Operator) -> int:
    """The number of the last request of the start: watches of all resources are open."""
    watches = [it.number for it in operator.proxy.record if it.verb == "watch"]
    return max(watches[: len(operator.proxy.watched())]) + 1


async def _start_again(
    bench: Bench,
    operator: Operator,
    case: Case,
    jobs: asyncio.Queue[tuple[Target, int, ErrorKind]],
    outcomes: list[Outcome],
) -> None:
    number = 10
    while not jobs.empty():
        target, nth, kind = jobs.get_nowait()
        told = f"{' '.join(filter(None, target))} {nth}"
        if bench.is_over:
            outcomes.append(Outcome.left_out("start", kind, told))
            continue

        def matches(request: Request, target: Target = target) -> bool:
            return request.target == target and not request.service

        shot = Shot(matches=matches, nth=nth, kind=kind)
        outcome = Outcome(scenario="start", fault=kind, point=told)
        number += 1
        is_hung_watch = kind == "hang" and target[0] == "watch"
        limit = HUNG_WATCH_SECONDS if is_hung_watch else LIMIT_SECONDS
        lives = len(operator.lives)
        try:
            operator.kill()
            await wait_until(lambda lives=lives: operator.lives[lives - 1].ended is not None, 10)
            with operator.proxy.armed(shot):
                await operator.wait_ready()
                edited = time.monotonic()
                await case.edit(engine={"maxNumSeqs": number})
                converged = await wait_until(
                    lambda number=number: f"--max-num-seqs {number} " in case.arguments,
                    CONVERGE_SECONDS,
                    f"the edit after {told}",
                )
            outcome.seconds = round(converged - max(shot.over_at, edited), 2)
        except TimeoutError as error:
            outcome.problems.append(str(error))
        outcome.is_reached = shot.fired is not None
        outcome.restarts = len(operator.lives) - lives - 1
        outcome.is_late = outcome.seconds > limit
        outcome.show()
        outcomes.append(outcome)
