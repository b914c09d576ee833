"""The queue of keys that wait to be reconciled.

A key is in it once, however often it is added; one worker at a time holds a key, and a key that is
added while a worker holds it comes again afterwards. Failures come back later and later.
`KeyQueue` is the bookkeeping, without clock or waiting; `WorkQueue` adds both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pagoda_operator.names import Key

BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 60.0


@dataclass(slots=True)
class KeyQueue:
    """Which key is due when; every time is an argument."""

    _due: dict[Key, float] = field(default_factory=dict)
    _held: set[Key] = field(default_factory=set)
    _failures: dict[Key, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: Key, at: float) -> None:
        """Let the key come at the time `at`, or when it would come anyway if that is earlier."""
        self._due[key] = min(at, self._due.get(key, at))

    def take(self, now: float) -> Key | None:
        """The key that has been due for longest and is not held; it is held from now on."""
        ready = [(at, key) for key, at in self._due.items() if at <= now and key not in self._held]
        if not ready:
            return None
        _, key = min(ready)
        del self._due[key]
        self._held.add(key)
        return key

    def release(self, key: Key) -> None:
        """The worker is done with the key."""
        self._held.remove(key)

    def next_due(self) -> float | None:
        """When the next key that is not held is due."""
        return min((at for key, at in self._due.items() if key not in self._held), default=None)

    def count_failure(self, key: Key) -> int:
        """Number of failures of the key in a row, this one included."""
        self._failures[key] = self._failures.get(key, 0) + 1
        return self._failures[key]

    def count_success(self, key: Key) -> None:
        """The next failure of the key is a first one."""
        self._failures.pop(key, None)


def backoff_seconds(num_failures: int, jitter: float) -> float:
    """How long a key waits after so many failures in a row.

    Args:
        jitter: 0 … 1; spreads the keys that failed together over half of the time.
    """
    # The exponent is bounded: an outage of days would overflow a float.
    full = min(BACKOFF_FIRST_SECONDS * 2.0 ** min(num_failures - 1, 20), BACKOFF_MAX_SECONDS)
    return full * (0.5 + 0.5 * jitter)


class QueueClosed(Exception):
    """No more keys are given out: the operator ends."""


class WorkQueue:
    """A KeyQueue that workers can wait for; belongs to one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys = KeyQueue()
        self._changed = asyncio.Condition()
        self._wakers: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: Key, delay_seconds: float = 0.0) -> None:
        """Let the key come after the delay."""
        self._keys.add(key, self._clock() + delay_seconds)
        self._wake()

    async def take(self) -> Key:
        """Wait for a key that is due; the caller has to end with `done` or `failed`.

        Raises:
            QueueClosed: the queue was closed.
        """
        async with self._changed:
            while self._is_closed or (key := self._keys.take(self._clock())) is None:
                if self._is_closed:
                    raise QueueClosed
                due = self._keys.next_due()
                timeout = None if due is None else max(0.0, due - self._clock())
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout)
                except TimeoutError:
                    continue
            return key

    def done(self, key: Key, *, requeue_seconds: float | None = None) -> None:
        """The key was reconciled; let it come again after a while if asked to."""
        self._keys.count_success(key)
        self._keys.release(key)
        if requeue_seconds is not None:
            self._keys.add(key, self._clock() + requeue_seconds)
        self._wake()

    def failed(self, key: Key, *, at_least_seconds: float = 0.0) -> float:
        """The key was not reconciled; it comes again later. Returns the seconds until then."""
        failures = self._keys.count_failure(key)
        delay = max(backoff_seconds(failures, random.random()), at_least_seconds)
        self._keys.release(key)
        self._keys.add(key, self._clock() + delay)
        self._wake()
        return delay

    def close(self) -> None:
        """Give no key out any more."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        task = asyncio.get_running_loop().create_task(self._notify())
        # The loop holds tasks only weakly.
        self._wakers.add(task)
        task.add_done_callback(self._wakers.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
