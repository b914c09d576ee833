"""How long a phase of the start still takes."""

from __future__ import annotations


class Pace:
    """Goes on as fast as the phase went since it began; a phase that falls back begins anew."""

    def __init__(self) -> None:
        self._phase = ""
        self._since_seconds = self._first_percent = self._last_percent = 0.0

    def seconds_left(self, phase: str, percent: float, now: float) -> float | None:
        """None as long as there is nothing to judge by."""
        if phase != self._phase or percent < self._last_percent:
            self._phase, self._since_seconds, self._first_percent = phase, now, percent
        self._last_percent = percent
        done = percent - self._first_percent
        return (now - self._since_seconds) * (100.0 - percent) / done if done > 0 else None
