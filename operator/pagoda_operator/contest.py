"""Others that change a child again and again: how long to wait before it is put back. No clock.

The first correction of an edit is immediate. When the same manager changes the same fields again,
each further one waits twice as long as the one before it, so that a fight costs few writes and few
new pods; after a long quiet time the next correction is a first one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from pagoda_operator.cause import Cause
from pagoda_operator.names import ChildRef
from pagoda_operator.queue import backoff_seconds

FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 300.0
# Longer than the longest delay: a fight is forgotten only when the other side gave up.
FORGET_SECONDS = 600.0
# One edit by hand, and another, are no fight.
CORRECTIONS_UNTIL_SAID = 3
# The child is right between a correction and the other's next write; the status does not flap.
CALM_SECONDS = 30.0


class Edit(NamedTuple):
    """A child, and who changes what of it, as words that `of CHILD` can follow."""

    child: ChildRef
    rival: str


@dataclass(frozen=True, slots=True)
class Contest:
    """Corrections of one edit in a row; `last` is in seconds of a monotonic clock."""

    corrections: int
    last: float

    @property
    def next_due(self) -> float:
        """When the next correction is due."""
        delay = backoff_seconds(self.corrections, 1.0, FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        return self.last + delay


@dataclass(slots=True)
class Contests:
    """The contests about the children of one service; every time is an argument."""

    _by_edit: dict[Edit, Contest] = field(default_factory=dict)

    def waits(self, now: float) -> dict[Edit, float]:
        """Seconds until each edit may be undone; those that may be now are absent."""
        self._by_edit = {
            edit: contest
            for edit, contest in self._by_edit.items()
            if now - contest.last < FORGET_SECONDS
        }
        return {
            edit: contest.next_due - now
            for edit, contest in self._by_edit.items()
            if contest.next_due > now
        }

    def note(self, edit: Edit, now: float) -> None:
        """The edit was undone."""
        before = self._by_edit.get(edit)
        self._by_edit[edit] = Contest(1 if before is None else before.corrections + 1, now)

    def find_cause(self, held: Collection[Edit], now: float) -> Cause | None:
        """What to tell of the fights that go on; `held` are the edits that wait to be undone."""
        told = [
            f"{edit.rival} of {edit.child} again and again"
            for edit, contest in sorted(self._by_edit.items())
            if contest.corrections >= CORRECTIONS_UNTIL_SAID
            and (edit in held or now - contest.last < CALM_SECONDS)
        ]
        if not told:
            return None
        text = (
            f"{'; '.join(told)}. It is put back less and less often. "
            "Stop the other manager, or ask for what it sets in this LLMService."
        )
        return Cause("Contested", text[0].upper() + text[1:], True)

    def seconds_to_next_look(self, held: Collection[Edit], now: float) -> float | None:
        """When an edit that waits is due, or what is told of a fight may be over."""
        waits = self.waits(now)
        pauses = [waits[edit] for edit in held if edit in waits]
        if self.find_cause(held, now) is not None:
            pauses.append(CALM_SECONDS)
        return min(pauses, default=None)
