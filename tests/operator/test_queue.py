"""The queue of keys."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.names import Key
from pagoda_operator.queue import MAX_WAIT_SECONDS, WorkQueue, backoff_seconds

A, B = Key("n", "a"), Key("n", "b")


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> WorkQueue:
    return WorkQueue(clock)


async def due(queue: WorkQueue) -> Key | None:
    """The key that the queue gives out now."""
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if taking.done():
        return taking.result()
    taking.cancel()
    return None


async def test_a_key_that_is_added_twice_comes_once(queue: WorkQueue) -> None:
    queue.add(A)
    queue.add(A)
    assert (await due(queue), await due(queue)) == (A, None)


async def test_a_key_that_is_held_comes_again_only_after_its_release(queue: WorkQueue) -> None:
    queue.add(A)
    assert await due(queue) == A
    queue.add(A)
    assert await due(queue) is None
    queue.done(A)
    assert await due(queue) == A


async def test_a_delayed_key_comes_when_it_is_due_and_the_earlier_of_two_times_counts(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A, 10.0)
    clock.now = 4.0
    assert await due(queue) is None
    queue.add(A, 1.0)
    queue.add(A, 16.0)
    clock.now = 5.0
    assert await due(queue) == A
    assert len(queue) == 0


async def test_the_key_that_is_due_for_longest_comes_first(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A, 2.0)
    queue.add(B, 1.0)
    clock.now = 3.0
    assert await due(queue) == B


async def test_what_is_urgent_comes_before_what_is_due_for_longer(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A)
    clock.now += 5.0
    queue.add_urgent(B)
    assert await due(queue) == B
    queue.add_urgent(B)
    # Held: it comes once it is released, and the others meanwhile.
    assert await due(queue) == A
    queue.add(A)
    queue.done(A)
    queue.done(B)
    assert await due(queue) == B
    queue.add_urgent(B)
    queue.failed(B, at_least_seconds=3.0)
    assert await due(queue) == A
    queue.done(A)
    queue.add_urgent(B)
    assert await due(queue) is None
    clock.now += 60.0
    assert await due(queue) == B


async def test_nothing_waits_long_for_what_is_urgent(queue: WorkQueue, clock: FakeClock) -> None:
    queue.add(A)
    clock.now += MAX_WAIT_SECONDS + 1
    queue.add_urgent(B)
    assert await due(queue) == A
    assert await due(queue) == B


async def test_a_key_comes_again_after_the_time_that_its_worker_asks_for(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A)
    assert await due(queue) == A
    queue.done(A, requeue_seconds=5.0)
    assert await due(queue) is None
    clock.now = 5.0
    assert await due(queue) == A


async def test_the_backoff_doubles_is_bounded_and_starts_anew_after_a_success(
    queue: WorkQueue, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [backoff_seconds(n, 1.0) for n in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert backoff_seconds(10_000, 1.0) == 60.0
    monkeypatch.setattr("random.random", lambda: 1.0)
    delays = []
    for fails in (True, True, False, True):
        queue.add(A)
        clock.now += 60
        assert await due(queue) == A
        if fails:
            delays.append(queue.failed(A))
        else:
            queue.done(A)
    assert delays == [0.2, 0.4, 0.2]


@given(num_failures=st.integers(1, 10**6), jitter=st.floats(0, 1))
def test_the_backoff_is_always_positive_and_bounded(num_failures: int, jitter: float) -> None:
    assert 0.1 <= backoff_seconds(num_failures, jitter) <= 60.0


async def test_a_waiting_worker_gets_a_key_as_soon_as_it_is_added(queue: WorkQueue) -> None:
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add(A)
    assert await asyncio.wait_for(worker, 1) == A


async def test_two_waiting_workers_get_two_keys(queue: WorkQueue) -> None:
    workers = [asyncio.create_task(queue.take()) for _ in range(2)]
    await asyncio.sleep(0)
    queue.add(A)
    queue.add(B)
    assert set(await asyncio.wait_for(asyncio.gather(*workers), 1)) == {A, B}


async def test_a_worker_wakes_by_itself_when_a_key_becomes_due() -> None:
    queue = WorkQueue(asyncio.get_running_loop().time)
    queue.add(A, 0.01)
    assert await asyncio.wait_for(queue.take(), 1) == A


async def test_two_workers_never_hold_one_key(queue: WorkQueue) -> None:
    queue.add(A)
    assert await queue.take() == A
    queue.add(A)
    second = asyncio.create_task(queue.take())
    await asyncio.sleep(0.01)
    assert not second.done()
    queue.done(A)
    assert await asyncio.wait_for(second, 1) == A


async def test_a_failed_key_comes_again_not_before_the_server_allows_it(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A)
    await queue.take()
    assert queue.failed(A, at_least_seconds=30.0) == 30.0
    clock.now = 31.0
    assert await asyncio.wait_for(queue.take(), 1) == A


async def test_what_the_server_asked_for_holds_for_events_of_the_key_as_well(
    queue: WorkQueue, clock: FakeClock
) -> None:
    queue.add(A)
    await queue.take()
    queue.add(A)
    queue.failed(A, at_least_seconds=30.0)
    queue.add(A)
    clock.now = 29.0
    assert await due(queue) is None
    clock.now = 31.0
    assert await due(queue) == A


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("add", "take", "done", "failed")), st.integers(0, 3), st.integers(0, 9)
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_what_is_given_out_is_always_what_is_due_for_longest(
    steps: list[tuple[str, int, int]],
) -> None:
    asyncio.run(compare(steps))


async def compare(steps: list[tuple[str, int, int]]) -> None:
    """The queue beside one that looks through all of its keys."""
    clock = FakeClock()
    queue = WorkQueue(clock)
    due_at: dict[Key, float] = {}
    not_before: dict[Key, float] = {}
    held: set[Key] = set()

    def add(key: Key, delay_seconds: float) -> None:
        at = max(clock.now + delay_seconds, not_before.get(key, 0.0))
        due_at[key] = min(at, due_at.get(key, at))

    for step, number, seconds in steps:
        clock.now += 0.5
        key = Key("n", str(number))
        if step == "add":
            queue.add(key, seconds)
            add(key, seconds)
        elif step == "take":
            free = [(at, key) for key, at in due_at.items() if key not in held]
            at, first = min(free, default=(float("inf"), None))
            taken = first if at <= clock.now else None
            assert await due(queue) == taken
            if taken is not None:
                del due_at[taken]
                held.add(taken)
        elif key in held and step == "done":
            held.remove(key)
            not_before.pop(key, None)
            queue.done(key, requeue_seconds=seconds)
            add(key, seconds)
        elif key in held:
            held.remove(key)
            delay = queue.failed(key, at_least_seconds=seconds)
            not_before[key] = clock.now + seconds
            if key in due_at:
                due_at[key] = max(due_at[key], not_before[key])
            add(key, delay)
        assert len(queue) == len(due_at)


async def test_a_closed_queue_sends_waiting_workers_home(queue: WorkQueue) -> None:
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.close()
    assert await asyncio.wait_for(worker, 1) is None
