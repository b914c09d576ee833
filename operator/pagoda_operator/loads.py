"""How far engines are that start: what they say at `/startup`, asked now and then.

An answer is news once it differs, so a status that has it is written as often as engines are asked
and no more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda_operator.cause import Cause
from pagoda_operator.engines import Inquiries, Inquiry, Silence, starting_address
from pagoda_operator.names import Key, Manifest

logger = logging.getLogger(__name__)

FIRST_ASK_SECONDS = 2.0
ASK_SECONDS = 15.0
MAX_PODS = 16
"""Of one service."""
MAX_ASKED_AT_ONCE = 50
"""Of all services."""
MAX_SECONDS_LEFT = 7 * 86400
MAX_BYTES_PER_SECOND = 1 << 40
_PHASE = re.compile(r"[a-z]{1,30}", re.ASCII)


@dataclass(slots=True)
class _Asked(Inquiry):
    addresses: dict[str, str]
    """name of a pod → its address"""
    answers: dict[str, Manifest] = field(default_factory=dict)


@dataclass(slots=True)
class Loads(Inquiries[_Asked]):
    """One task for each service that has starting engines."""

    _slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_ASKED_AT_ONCE), init=False
    )

    def find(self, key: Key, pods: Sequence[Manifest]) -> list[Manifest]:
        """`status.load`: what starting pods said last; they are asked from now on."""
        addresses = {
            pod["metadata"]["name"]: address
            for pod in pods
            if (address := starting_address(pod)) is not None
        }
        addresses = dict(sorted(addresses.items())[:MAX_PODS])
        if not addresses:
            self.forget(key)
            return []
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = _Asked(addresses)
            asked.start(self._ask_forever(key, asked))
        asked.addresses = addresses
        return [asked.answers[name] for name in addresses if name in asked.answers]

    async def _ask_forever(self, key: Key, asked: _Asked) -> None:
        pause = FIRST_ASK_SECONDS
        while True:
            await asyncio.sleep(pause)
            pause = ASK_SECONDS
            names = list(asked.addresses)
            found = await asyncio.gather(*(self._ask(name, asked) for name in names))
            answers = {load["pod"]: load for load in found if load is not None}
            if answers != asked.answers:
                asked.answers = answers
                self.on_change(key)

    async def _ask(self, name: str, asked: _Asked) -> Manifest | None:
        answer = await self.engines.read(
            asked.addresses[name], "/startup", self._slots, statuses=(200, 503)
        )
        return None if isinstance(answer, Silence) else parse_progress(name, answer)


def parse_progress(pod: str, body: bytes) -> Manifest | None:
    """An entry of `status.load`; None if the answer says nothing, or that the engine is ready."""
    try:
        said = json.loads(body)
        phase, percent, speed = said["phase"], said["percent"], said["bytes_per_second"]
        left = said.get("eta_seconds")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    is_phase = isinstance(phase, str) and _PHASE.fullmatch(phase) and phase != "ready"
    if not is_phase or not _is_number(percent, 100) or not _is_number(speed, MAX_BYTES_PER_SECOND):
        return None
    load: Manifest = {"pod": pod, "phase": phase.capitalize(), "percent": int(percent)}
    if speed:
        load["bytesPerSecond"] = int(speed)
    if _is_number(left, MAX_SECONDS_LEFT):
        load["etaSeconds"] = math.ceil(left)
    return load


def with_progress(cause: Cause | None, loads: Sequence[Manifest]) -> Cause | None:
    """The cause, with how far the engine is that has longest to go, if loading is all there is."""
    if cause is None or cause.reason != "LoadingModel" or not loads:
        return cause
    load = max(loads, key=lambda load: (load.get("etaSeconds", 0), -load["percent"]))
    text = f"{cause.message.rstrip('.')}: {load['phase']} {load['percent']} %"
    if "etaSeconds" in load:
        text += f", about {_say_seconds(load['etaSeconds'])} more"
    if len(loads) > 1:
        text += f" ({load['pod']}, of {len(loads)} that start)"
    return Cause(cause.reason, f"{text}.", cause.is_stalled)


def _say_seconds(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"


def _is_number(value: object, largest: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= largest  # type: ignore[operator]
