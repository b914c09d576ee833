"""When the requests of a run are sent."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pagoda_runtime.bench.endpoint import RequestRecord

T = TypeVar("T")

# So many in a row that find no server, and the rest is not tried.
MAX_UNREACHABLE = 16


def make_arrivals(
    num_requests: int, *, request_rate: float, burstiness: float, rng: random.Random
) -> list[float]:
    """Seconds from the start at which each request is sent; the first comes at 0.

    Args:
        request_rate: requests per second; infinity sends all at once.
        burstiness: shape of the gamma distribution of the gaps. 1 is a Poisson process, less is
            burstier, infinity gives equal gaps.
    """
    if math.isinf(request_rate):
        return [0.0] * num_requests
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        arrivals.append(now)
        if math.isinf(burstiness):
            now += 1 / request_rate
        else:
            now += rng.gammavariate(burstiness, 1 / (request_rate * burstiness))
    return arrivals


async def run_load(
    items: Sequence[T],
    arrivals: Sequence[float],
    send: Callable[[T], Awaitable[RequestRecord]],
    *,
    max_concurrency: int | None,
) -> list[RequestRecord]:
    """Send every item at its time, in order, and return the records of those that were sent.

    Args:
        max_concurrency: requests at once; the next one waits for a place, whatever its time.
    Returns: fewer records than items if the server could not be reached MAX_UNREACHABLE times in
        a row: a run ends when its server has died.
    """
    places = asyncio.Semaphore(max_concurrency or len(items) or 1)
    records: list[RequestRecord] = []
    num_unreachable = 0

    async def send_one(item: T) -> None:
        nonlocal num_unreachable
        try:
            record = await send(item)
        finally:
            places.release()
        records.append(record)
        num_unreachable = num_unreachable + 1 if record.failure == "cannot connect" else 0

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for item, arrival in zip(items, arrivals, strict=True):
            # asyncio's clock may wake a little early; the rest is not worth a loop.
            delay = started + arrival - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            await places.acquire()
            if num_unreachable >= MAX_UNREACHABLE:
                break
            tasks.create_task(send_one(item))
    return sorted(records, key=lambda record: record.started)
