"""The operator with a thousand LLMServices: speed, memory, and what it takes while nothing happens.

A real API server with its controllers and scheduler, nodes of kwok with GPUs that are not there,
engines that a stub plays, all on this machine. `make bench-operator` runs it, in half an hour.

    python benchmarks/operator_scale.py --out FILE [--num-services 1000] [--idle-seconds 600]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audit import Request
from operator_fleet import Fleet, by_operator, cpu_seconds, fleet, resident_bytes
from report import Bar, Result, publish

from pagoda_operator.cluster import ApiServer

AUTOSCALED_PART = 0.2
EDITS_PER_SECOND = 10
# Besides, where the rollouts that follow leave the cores some room.
FEW_EDITS_PER_SECOND = 3
EDIT_SECONDS = 60
SETTLE_SECONDS = 30.0
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Idle:
    """What the operator took while nobody asked it for anything."""

    cpu_percent: float
    written: list[Request]
    read: Counter[str]


async def apply_all(bench: Fleet, api: ApiServer) -> list[Result]:
    """All services at once, until each is Ready."""
    requests, started = bench.watch_requests(), time.monotonic()
    await bench.apply(api, range(bench.num_services))
    applied = time.monotonic() - started
    await bench.wait(api, "seen", TIMEOUT_SECONDS)
    seen = time.monotonic() - started
    await bench.wait(api, "Ready", TIMEOUT_SECONDS)
    ready = time.monotonic() - started
    asked = by_operator(requests.read())
    kinds = Counter(f"{it.verb} {it.resource}/{it.subresource}".rstrip("/") for it in asked)
    shown = {name: round(number / bench.num_services, 2) for name, number in kinds.most_common()}
    times = {"applied_after_seconds": round(applied, 1), "ready_after_seconds": round(ready, 1)}
    return [
        at_most("all_observed", seen, 180.0, "s", **times),
        at_most("requests_per_service", len(asked) / bench.num_services, 25.0, "", **shown),
    ]


async def be_idle(bench: Fleet, seconds: float) -> Idle:
    await asyncio.sleep(SETTLE_SECONDS)
    requests, before = bench.watch_requests(), cpu_seconds(bench.operator.pid)
    started = time.monotonic()
    await asyncio.sleep(seconds)
    took = cpu_seconds(bench.operator.pid) - before
    asked = by_operator(requests.read())
    return Idle(
        100 * took / (time.monotonic() - started),
        [it for it in asked if it.is_write],
        Counter(f"{it.verb} {it.resource}" for it in asked if not it.is_write),
    )


def idle_results(name: str, idle: Idle, bar_percent: float, seconds: float) -> list[Result]:
    details = {"seconds": seconds, "reads": dict(idle.read.most_common())}
    written = Counter(f"{it.verb} {it.resource}/{it.subresource}" for it in idle.written)
    return [
        at_most(f"{name}_cpu", idle.cpu_percent, bar_percent, "% of a core", **details),
        # A ratio needs something to compare with: one write is what is not allowed any more.
        Result(
            f"{name}_writes",
            len(idle.written),
            "writes",
            "one write",
            1.0,
            Bar(at_most=0.0),
            dict(written),
        ),
    ]


async def scale_some(bench: Fleet, api: ApiServer) -> None:
    """Let the first services scale by themselves, one pod each."""
    some = range(int(bench.num_services * AUTOSCALED_PART))
    await bench.apply(api, some, autoscaling={"minReplicas": 1, "maxReplicas": 2})
    await bench.wait(api, "Ready", TIMEOUT_SECONDS)


async def edit(bench: Fleet, api: ApiServer, per_second: int) -> list[float]:
    """Change the engine's flags of ever another service, and see when its Deployment is written.

    Returns: the seconds of each edit, sorted.
    """
    first = int(bench.num_services * AUTOSCALED_PART)
    numbers = range(first, bench.num_services)[: per_second * EDIT_SECONDS]
    requests, started = bench.watch_requests(), time.monotonic()
    edits = []
    for count, number in enumerate(numbers):
        await asyncio.sleep(max(0.0, started + count / per_second - time.monotonic()))
        changed = {"maxNumSeqs": per_second}
        edits.append(asyncio.create_task(bench.apply(api, [number], engine=changed)))
    await asyncio.gather(*edits)
    seconds: list[float] = []
    for _ in range(int(EDIT_SECONDS)):
        seconds = sorted(seconds_to_writes(requests.read()))
        if len(seconds) == len(numbers):
            break
        await asyncio.sleep(2.0)
    else:
        raise TimeoutError(f"{len(seconds)} of {len(numbers)} edits reached their Deployment")
    return seconds


def edit_result(metric: str, seconds: Sequence[float], per_second: int) -> Result:
    details = {
        "edits": len(seconds),
        "edits_per_second": per_second,
        "median_seconds": round(statistics.median(seconds), 3),
        "longest_seconds": round(seconds[-1], 3),
    }
    p99 = seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))]
    return at_most(metric, p99, 1.0, "s", **details)


def seconds_to_writes(requests: Sequence[Request]) -> list[float]:
    """From the end of each edit to that of the first write of the service's Deployment."""
    edited, seconds = {}, []
    for it in requests:
        if it.verb != "patch":
            continue
        if it.resource == "llmservices" and not it.subresource:
            edited[it.namespace, f"{it.name}-engine"] = it.finished
        if it.resource == "deployments" and (it.namespace, it.name) in edited:
            since = edited.pop((it.namespace, it.name))
            seconds.append((it.finished - since).total_seconds())
    return seconds


def at_most(metric: str, value: float, limit: float, unit: str, **details: object) -> Result:
    return Result(metric, value, unit, "the bar", limit, Bar(at_most=1.0), details)


async def measure(bench: Fleet, idle_seconds: float) -> list[Result]:
    api = await bench.connect()
    try:
        results = await apply_all(bench, api)
        show(results)
        results += idle_results("idle", await be_idle(bench, idle_seconds), 5.0, idle_seconds)
        show(results[2:])
        await scale_some(bench, api)
        idle = await be_idle(bench, idle_seconds / 2)
        results += idle_results("idle_autoscaled", idle, 5.0, idle_seconds / 2)
        show(results[4:])
        few = await edit(bench, api, FEW_EDITS_PER_SECOND)
        results.append(edit_result("few_edits_to_child_write_p99", few, FEW_EDITS_PER_SECOND))
        many = await edit(bench, api, EDITS_PER_SECOND)
        results.append(edit_result("edit_to_child_write_p99", many, EDITS_PER_SECOND))
    finally:
        await api.close()
    now, most = resident_bytes(bench.operator.pid)
    details = {"at_the_end_mb": round(now / 1e6, 1)}
    results.append(at_most("largest_resident_size", most / 1e6, 220.0, "MB", **details))
    return results


def show(results: Sequence[Result]) -> None:
    for it in results:
        print(f"  {it.metric} {it.value:.2f} {it.unit} {it.details}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--num-services", type=int, default=1000)
    parser.add_argument("--idle-seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(arguments.num_services, Path(folder)) as bench,
    ):
        results = asyncio.run(measure(bench, arguments.idle_seconds))
    publish("operator", results, arguments.out, num_services=arguments.num_services)


if __name__ == "__main__":
    main()
