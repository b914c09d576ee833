"""Arrivals, concurrency, and the end of a run whose server has died."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time

import pytest

from pagoda_runtime.bench.endpoint import RequestRecord
from pagoda_runtime.bench.load import MAX_UNREACHABLE, make_arrivals, run_load


def gaps(burstiness: float) -> list[float]:
    arrivals = make_arrivals(4000, request_rate=5.0, burstiness=burstiness, rng=random.Random(0))
    assert arrivals[0] == 0.0
    return [b - a for a, b in itertools.pairwise(arrivals)]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread_asked_for(burstiness):
    values = gaps(burstiness)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert mean == pytest.approx(0.2, rel=0.1)
    assert mean**2 / variance == pytest.approx(burstiness, rel=0.15)


def test_infinite_burstiness_gives_equal_gaps():
    assert gaps(math.inf) == pytest.approx([0.2] * 3999)


def test_an_infinite_rate_sends_all_at_once():
    rng = random.Random(0)
    assert make_arrivals(3, request_rate=math.inf, burstiness=1.0, rng=rng) == [0.0] * 3


async def test_a_closed_loop_keeps_its_concurrency():
    running, most = 0, 0

    async def send(item: int) -> RequestRecord:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return RequestRecord(started=time.perf_counter())

    records = await run_load(range(10), [0.0] * 10, send, max_concurrency=3)
    assert (len(records), most) == (10, 3)


async def test_an_open_loop_does_not_wait_for_answers():
    release = asyncio.Event()
    started: list[float] = []

    async def send(item: int) -> RequestRecord:
        started.append(time.perf_counter())
        if item == 2:
            release.set()
        await release.wait()
        return RequestRecord(started=started[-1])

    await run_load(range(3), [0.0, 0.01, 0.02], send, max_concurrency=None)
    assert started[2] - started[0] >= 0.019


async def test_a_run_ends_when_its_server_is_gone():
    async def send(item: int) -> RequestRecord:
        return RequestRecord(started=float(item), failure="cannot connect")

    records = await run_load(range(1000), [0.0] * 1000, send, max_concurrency=1)
    assert MAX_UNREACHABLE <= len(records) <= MAX_UNREACHABLE + 1
