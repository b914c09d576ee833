"""R1: the operator is killed before and after every write, and started again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from faults.bench import Bench, Outcome, writes_of
from faults.operators import Operator
from faults.plan import FaultKind, Shot
from faults.scenarios import SCENARIOS, Scenario

LIMIT_SECONDS = 10.0
SIDES: tuple[FaultKind, ...] = ("kill before", "kill after")
Job = tuple[Scenario, int, FaultKind]


async def run_crashes(
    bench: Bench, scenarios: Sequence[Scenario] = SCENARIOS, num_operators: int = 3
) -> tuple[list[Outcome], list[str]]:
    """Every write of the scenarios; also what the records of the operators show."""
    jobs: asyncio.Queue[Job] = asyncio.Queue()
    outcomes: list[Outcome] = []
    await bench.refer(scenarios)
    async with AsyncExitStack() as running:
        operators = [
            await running.enter_async_context(bench.operator(f"crashes-{number}"))
            for number in range(num_operators)
        ]
        for scenario in scenarios:
            for nth in range(1, bench.references[scenario.name].num_writes + 1):
                for side in SIDES:
                    jobs.put_nowait((scenario, nth, side))
        work = (_work(bench, operator, jobs, outcomes) for operator in operators)
        await asyncio.gather(*work)
        violations = [it for operator in operators for it in bench.audit(operator)]
    return outcomes, violations


async def _work(
    bench: Bench, operator: Operator, jobs: asyncio.Queue[Job], outcomes: list[Outcome]
) -> None:
    """Take jobs while there are any."""
    while not jobs.empty():
        scenario, nth, side = jobs.get_nowait()
        if bench.is_over:
            outcomes.append(Outcome.left_out(scenario.name, side, f"write {nth}"))
            continue
        await operator.wait_ready()

        def shot(name: str, nth: int = nth, side: FaultKind = side) -> Shot:
            return Shot(matches=writes_of(name), nth=nth, kind=side)

        point = f"write {nth}"
        outcomes.append(await bench.run(operator, scenario, shot, point, LIMIT_SECONDS))
