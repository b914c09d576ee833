"""Others that change a child again and again: how long to wait before it is put back. No clock.

The first correction of a child is immediate. Each further one waits twice as long as the one before
it, so that a fight with another controller costs few writes and few new pods; after a long quiet
time the next correction is a first one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pagoda_operator.causes import Cause
from pagoda_operator.names import ChildRef

FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 300.0
# Longer than the longest delay: a fight is forgotten only when the other side gave up.
FORGET_SECONDS = 600.0
# One edit by hand, and another, are no fight.
CORRECTIONS_UNTIL_SAID = 3
# The child is right between a correction and the other's next write; the status does not flap.
CALM_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Contest:
    """Corrections of one child in a row; `last` is in seconds of a monotonic clock."""

    corrections: int
    last: float
    rival: str
    """Who changes what, as words of a sentence."""

    @property
    def next_due(self) -> float:
        """When the next correction is due."""
        # The exponent is bounded: a fight of months would overflow a float.
        delay = FIRST_DELAY_SECONDS * 2.0 ** min(self.corrections - 1, 20)
        return self.last + min(delay, MAX_DELAY_SECONDS)


@dataclass(slots=True)
class Contests:
    """The contests about the children of one service; every time is an argument."""

    _by_child: dict[ChildRef, Contest] = field(default_factory=dict)

    def waits(self, now: float) -> dict[ChildRef, float]:
        """Seconds until each child may be put back; those that may be now are absent."""
        self._by_child = {
            ref: contest
            for ref, contest in self._by_child.items()
            if now - contest.last < FORGET_SECONDS
        }
        return {
            ref: contest.next_due - now
            for ref, contest in self._by_child.items()
            if contest.next_due > now
        }

    def note(self, ref: ChildRef, rival: str, now: float) -> None:
        """The child was put back; several writes at the same time are one correction."""
        before = self._by_child.get(ref, Contest(0, -1.0, rival))
        self._by_child[ref] = Contest(before.corrections + (before.last != now), now, rival)

    def find_cause(self, held: Collection[ChildRef], now: float) -> Cause | None:
        """What to tell of the fights that go on.

        Args:
            held: children that are not as they should be now, and wait.
        """
        told = [
            f"{contest.rival} of {ref} again and again"
            for ref, contest in sorted(self._by_child.items())
            if contest.corrections >= CORRECTIONS_UNTIL_SAID
            and (ref in held or now - contest.last < CALM_SECONDS)
        ]
        if not told:
            return None
        text = (
            f"{'; '.join(told)}. It is put back less and less often. "
            "Stop the other manager, or ask for what it sets in this LLMService."
        )
        return Cause("Contested", text[0].upper() + text[1:], True)

    def seconds_to_next_look(self, held: Collection[ChildRef], now: float) -> float | None:
        """When a child that waits is due, or what is told of a fight may be over."""
        waits = self.waits(now)
        pauses = [waits[ref] for ref in held if ref in waits]
        if self.find_cause(held, now) is not None:
            pauses.append(CALM_SECONDS)
        return min(pauses, default=None)
