"""The queue of keys that wait to be reconciled.

A key is in it once, however often it is added; one worker at a time holds a key, and a key that is
added while a worker holds it comes again afterwards. Failures come back later and later.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from collections.abc import Callable

from pagoda_operator.names import Key

BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 60.0
# Beyond it, the entries that are true no more are thrown out.
MAX_ENTRIES_PER_KEY = 4
# Who is due for longer waits for nothing urgent.
MAX_WAIT_SECONDS = 60.0


def backoff_seconds(
    num_failures: int,
    jitter: float,
    first: float = BACKOFF_FIRST_SECONDS,
    longest: float = BACKOFF_MAX_SECONDS,
) -> float:
    """How long to wait after so many failures in a row.

    Args:
        jitter: 0 … 1; spreads what failed together over half of the time.
    """
    # The exponent is bounded: an outage of days would overflow a float.
    return min(first * 2.0 ** min(num_failures - 1, 20), longest) * (0.5 + 0.5 * jitter)


class WorkQueue:
    """Which key is due when; belongs to one event loop.

    Args:
        note_wait: gets the seconds that a key was due before a worker took it.
    """

    def __init__(
        self, clock: Callable[[], float], note_wait: Callable[[float], None] | None = None
    ) -> None:
        self._clock = clock
        self._note_wait = note_wait
        self._due: dict[Key, float] = {}
        # Every key that nobody holds is in it with its time, and entries that were true once.
        self._heap: list[tuple[float, Key]] = []
        self._held: set[Key] = set()
        # Keys that come before all others, in order; none that has to wait for its time.
        self._urgent: dict[Key, None] = {}
        self._failures: dict[Key, int] = {}
        self._not_before: dict[Key, float] = {}
        self._changed = asyncio.Event()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._due)

    @property
    def num_due(self) -> int:
        """Keys that wait for a worker, and not for their time."""
        now = self._clock()
        return sum(at <= now for at in self._due.values())

    def add(self, key: Key, delay_seconds: float = 0.0) -> None:
        """Let the key come after the delay, or when it would come anyway if that is earlier."""
        at = max(self._clock() + delay_seconds, self._not_before.get(key, 0.0))
        if at < self._due.get(key, float("inf")):
            self._set_due(key, at)

    def add_urgent(self, key: Key) -> None:
        """Let the key come now, before others that are due: somebody waits for it."""
        self.add(key)
        if self._due[key] <= self._clock():
            self._urgent[key] = None

    async def take(self) -> Key | None:
        """Wait for the key that is due for longest; the caller has to end with `done` or `failed`.

        None once the queue is closed.
        """
        while not self._is_closed:
            at, key = self._first()
            pause = at - self._clock()
            if key is not None and pause <= 0:
                del self._due[key]
                self._urgent.pop(key, None)
                self._held.add(key)
                if self._note_wait is not None:
                    self._note_wait(-pause)
                return key
            # Nothing is awaited between the look and the wait: no change is missed.
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if key is None else pause):
                    await self._changed.wait()
        return None

    def done(self, key: Key, *, requeue_seconds: float | None = None) -> None:
        """The key was reconciled; let it come again after a while if asked to."""
        self._failures.pop(key, None)
        self._not_before.pop(key, None)
        self._release(key)
        if requeue_seconds is not None:
            self.add(key, requeue_seconds)

    def failed(self, key: Key, *, at_least_seconds: float = 0.0) -> float:
        """The key was not reconciled; it comes again later. Returns the seconds until then."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay = max(backoff_seconds(self._failures[key], random.random()), at_least_seconds)
        # What a server asked for (Retry-After) holds for events of the key as well.
        self._not_before[key] = self._clock() + at_least_seconds
        if key in self._due:
            self._due[key] = max(self._due[key], self._not_before[key])
        self._urgent.pop(key, None)
        self._release(key)
        self.add(key, delay)
        return delay

    def close(self) -> None:
        self._is_closed = True
        self._changed.set()

    def _release(self, key: Key) -> None:
        self._held.remove(key)
        if key in self._due:
            self._set_due(key, self._due[key])
        self._changed.set()

    def _set_due(self, key: Key, at: float) -> None:
        self._due[key] = at
        if key not in self._held:
            heapq.heappush(self._heap, (at, key))
            if len(self._heap) > MAX_ENTRIES_PER_KEY * len(self._due) + 100:
                self._heap = [(at, key) for key, at in self._due.items() if key not in self._held]
                heapq.heapify(self._heap)
        self._changed.set()

    def _first(self) -> tuple[float, Key | None]:
        """When which key is due first, of those that nobody holds; without one, never."""
        at, key = self._longest()
        if self._clock() - at <= MAX_WAIT_SECONDS:
            for urgent in self._urgent:
                if urgent not in self._held:
                    return self._due[urgent], urgent
        return at, key

    def _longest(self) -> tuple[float, Key | None]:
        while self._heap:
            at, key = self._heap[0]
            if key not in self._held and self._due.get(key) == at:
                return at, key
            heapq.heappop(self._heap)
        return float("inf"), None
