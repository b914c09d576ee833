"""R3, R5 and R8: an API server that is gone, a cluster where nothing happens, a clock that jumps.

Each gives its figures and what was wrong; `make faults` has them beside the runs with one fault.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from faults.bench import CONVERGE_SECONDS, Bench
from faults.operators import Operator
from faults.plan import Request
from faults.scenarios import Case
from faults.world import wait_until

READY_SECONDS = 600.0
# What is measured begins when the last event of the last pod was heeded.
SETTLE_SECONDS = 15.0
BACK_SECONDS = 30.0
GROWTH_BYTES = 5_000_000
JUMPS_SECONDS = (3600.0, -3600.0, 0.0, -7200.0)
Figures = dict[str, Any]


async def _serve(bench: Bench, operator: Operator, prefix: str, number: int) -> list[Case]:
    cases = [bench.case(operator.namespace, prefix) for _ in range(number)]
    await asyncio.gather(*(case.create() for case in cases))
    for case in cases:
        await wait_until(lambda case=case: case.says("Ready"), READY_SECONDS, case.name)
    await asyncio.sleep(SETTLE_SECONDS)
    return cases


async def run_outage(
    bench: Bench, seconds: float, num_services: int = 10, limit_seconds: float = BACK_SECONDS
) -> Figures:
    """R3: the API server is gone for a while, in which users go on."""
    problems: list[str] = []
    async with bench.operator("outage") as operator:
        cases = await _serve(bench, operator, "o", num_services)
        edited, broken, deleted, *others = cases
        pods = {it.name: _pods(bench, it) for it in others}
        before = operator.rss_bytes()
        operator.proxy.cut()
        await edited.edit(engine={"maxNumSeqs": 7})
        await broken.delete("Service")
        await deleted.delete()
        new = bench.case(operator.namespace, "o")
        await new.create()
        await asyncio.sleep(seconds)
        growth = operator.rss_bytes() - before
        operator.proxy.restore()
        back = time.monotonic()

        def is_made_up_for() -> bool:
            are_ready = all(it.says("Ready") for it in (edited, broken, new, *others))
            return are_ready and "--max-num-seqs 7 " in edited.arguments and bool(broken.front)

        took = 0.0
        try:
            took = await wait_until(is_made_up_for, CONVERGE_SECONDS, "what was missed") - back
        except TimeoutError as error:
            problems.append(str(error))
        if took > limit_seconds:
            problems.append(f"converged after {took:.1f} s; the limit is {limit_seconds:.0f} s")
        if {it.name: _pods(bench, it) for it in others} != pods:
            problems.append("pods of services that nobody touched were replaced")
        if operator.num_restarts:
            problems.append(f"the operator ended {operator.num_restarts} times")
        if growth > GROWTH_BYTES:
            problems.append(f"memory grew by {growth} bytes")
        problems += bench.audit(operator)
        return {
            "outage_seconds": seconds,
            "services": num_services,
            "restarts": operator.num_restarts,
            "memory_growth_bytes": growth,
            "converged_after_seconds": round(took, 2),
            "problems": problems,
        }


def _pods(bench: Bench, case: Case) -> set[str]:
    found = bench.world.of_service(case.namespace, case.name)
    return {manifest["metadata"]["uid"] for kind, manifest in found if kind == "Pod"}


async def run_stability(bench: Bench, seconds: float, num_services: int = 100) -> Figures:
    """R5: nothing happens; then one service is edited."""
    async with bench.operator("stability") as operator:
        cases = await _serve(bench, operator, "i", num_services)
        first = len(operator.proxy.record)
        await asyncio.sleep(seconds)
        idle = operator.proxy.record[first:]
        writes = [it for it in idle if it.is_write and not it.is_lease]
        # One edit that leaves the pods alone, and one that replaces them.
        quiet = await _measure_edit(
            operator, cases[0], {"disruption": {"maxUnavailable": 1}}, lambda _: True
        )
        rollout = await _measure_edit(
            operator,
            cases[1],
            {"engine": {"maxNumSeqs": 7}},
            lambda case: "--max-num-seqs 7 " in case.arguments,
        )
        problems = [f"{it}: a write while nothing happened" for it in writes]
        rate = len(idle) / seconds
        if rate >= 2:
            problems.append(f"{rate:.2f} requests/s; the limit is 2")
        # Pods that come and go are news of their own.
        if quiet["reconciles"] > 3 or quiet["writes"] > 1 + quiet["children"]:
            problems.append(f"one edit: {quiet}")
        return {
            "idle_seconds": seconds,
            "services": num_services,
            "writes": len(writes),
            "requests_per_second": round(rate, 3),
            "edit_without_pods": quiet,
            "edit_with_rollout": rollout,
            "problems": problems + bench.audit(operator),
        }


async def _measure_edit(operator: Operator, case: Case, spec: Any, is_done: Any) -> Figures:
    """What one edit costs, until it is settled."""
    first, before = len(operator.proxy.record), await _reconciles(operator)
    await case.edit(**spec)
    await wait_until(lambda: is_done(case) and case.says("Ready"), BACK_SECONDS, case.name)
    await asyncio.sleep(5.0)
    requests = operator.proxy.of_service(case.name, first)
    written = [it for it in _writes(requests) if it.resource != "events"]
    return {
        "reconciles": await _reconciles(operator) - before,
        "requests": len(requests),
        "writes": len(written),
        "children": len({it.target for it in written if it.resource != "llmservices"}),
    }


def _writes(requests: Sequence[Request]) -> list[Request]:
    return [it for it in requests if it.is_write]


async def _reconciles(operator: Operator) -> int:
    url = f"http://127.0.0.1:{operator.health_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text = await response.text()
    found = re.findall(r"^controller_runtime_reconcile_total\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, found)))


async def run_clock(bench: Bench, num_services: int = 5, seconds_each: float = 20.0) -> Figures:
    """R8: the clock of day jumps, also backwards."""
    clock = bench.folder / "clock"
    clock.write_text("0")
    problems: list[str] = []
    slowest = 0.0
    async with bench.operator("clock", clock=str(clock)) as operator:
        cases = await _serve(bench, operator, "t", num_services)
        flaps = 0
        for number, jump in enumerate(JUMPS_SECONDS):
            first = len(operator.proxy.record)
            clock.write_text(str(jump))
            await asyncio.sleep(seconds_each)
            written = [it for it in operator.proxy.record[first:] if not it.is_lease]
            flaps += len(_writes(written))
            # What users do is done at any time, and by a process that starts then.
            edit = 20 + number
            edited = time.monotonic()
            await cases[0].edit(engine={"maxNumSeqs": edit})

            def is_done(edit: int = edit) -> bool:
                is_set = f"--max-num-seqs {edit} " in cases[0].arguments
                return is_set and cases[0].says("Ready")

            done = await wait_until(is_done, BACK_SECONDS, f"an edit at {jump} s")
            slowest = max(slowest, done - edited)
            operator.kill()
            await asyncio.sleep(1.0)
            await operator.wait_ready()
            await asyncio.sleep(SETTLE_SECONDS)
        if flaps:
            problems.append(f"{flaps} writes that only the clock caused")
        if operator.num_restarts != len(JUMPS_SECONDS):
            problems.append(f"{operator.num_restarts} restarts; {len(JUMPS_SECONDS)} were ours")
        return {
            "jumps_seconds": list(JUMPS_SECONDS),
            "services": num_services,
            "writes": flaps,
            "slowest_edit_seconds": round(slowest, 2),
            "problems": problems + bench.audit(operator),
        }
