"""The queue of keys."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.names import Key
from pagoda_operator.queue import KeyQueue, QueueClosed, WorkQueue, backoff_seconds

A, B = Key("n", "a"), Key("n", "b")


def test_a_key_that_is_added_twice_comes_once() -> None:
    queue = KeyQueue()
    queue.add(A, 0.0)
    queue.add(A, 0.0)
    assert (queue.take(1.0), queue.take(1.0)) == (A, None)


def test_a_key_that_is_held_comes_again_only_after_its_release() -> None:
    queue = KeyQueue()
    queue.add(A, 0.0)
    assert queue.take(0.0) == A
    queue.add(A, 0.0)
    assert queue.take(0.0) is None
    assert queue.next_due() is None
    queue.release(A)
    assert queue.take(0.0) == A


def test_a_delayed_key_comes_when_it_is_due_and_the_earlier_of_two_times_counts() -> None:
    queue = KeyQueue()
    queue.add(A, 10.0)
    assert (queue.take(9.9), queue.next_due()) == (None, 10.0)
    queue.add(A, 5.0)
    queue.add(A, 20.0)
    assert queue.take(5.0) == A
    assert len(queue) == 0


def test_the_key_that_is_due_for_longest_comes_first() -> None:
    queue = KeyQueue()
    queue.add(A, 2.0)
    queue.add(B, 1.0)
    assert queue.take(3.0) == B


def test_the_backoff_doubles_is_bounded_and_starts_anew_after_a_success() -> None:
    assert [backoff_seconds(n, 1.0) for n in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert backoff_seconds(10_000, 1.0) == 60.0
    queue = KeyQueue()
    assert [queue.count_failure(A), queue.count_failure(A)] == [1, 2]
    queue.count_success(A)
    assert queue.count_failure(A) == 1


@given(num_failures=st.integers(1, 10**6), jitter=st.floats(0, 1))
def test_the_backoff_is_always_positive_and_bounded(num_failures: int, jitter: float) -> None:
    assert 0.1 <= backoff_seconds(num_failures, jitter) <= 60.0


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_waiting_worker_gets_a_key_as_soon_as_it_is_added() -> None:
    queue = WorkQueue(FakeClock())
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add(A)
    assert await asyncio.wait_for(worker, 1) == A


async def test_two_workers_never_hold_one_key() -> None:
    queue = WorkQueue(FakeClock())
    queue.add(A)
    assert await queue.take() == A
    queue.add(A)
    second = asyncio.create_task(queue.take())
    await asyncio.sleep(0.01)
    assert not second.done()
    queue.done(A)
    assert await asyncio.wait_for(second, 1) == A


async def test_a_failed_key_comes_again_not_before_the_server_allows_it() -> None:
    clock = FakeClock()
    queue = WorkQueue(clock)
    queue.add(A)
    await queue.take()
    assert queue.failed(A, at_least_seconds=30.0) == 30.0
    clock.now = 31.0
    assert await asyncio.wait_for(queue.take(), 1) == A


async def test_a_closed_queue_sends_waiting_workers_home() -> None:
    queue = WorkQueue(FakeClock())
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.close()
    with pytest.raises(QueueClosed):
        await asyncio.wait_for(worker, 1)
