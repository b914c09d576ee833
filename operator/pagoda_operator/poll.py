"""Asks engines for their load, and keeps what the autoscaler has decided.

Each service whose replicas can change has one task: it asks all ready pods at once, every
BUSY_SECONDS while there is demand and less and less often (up to IDLE_SECONDS) while there is none.
When the decision changes, the service is put in the queue; the reconciler writes the replicas.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagoda_operator.engines import Engines, Silence, ready_address
from pagoda_operator.flags import PORT
from pagoda_operator.loads import Loads
from pagoda_operator.names import Key, Manifest
from pagoda_operator.reports import Reports
from pagoda_operator.scaling import PodLoad, ScalingPolicy, ScalingState, decide, initial_target
from pagoda_operator.spec import LLMService
from pagoda_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
IDLE_SECONDS = 5.0
IDLE_FACTOR = 1.25
# Many services are asked at once, at the same times: a process that wakes for each one takes three
# times as much of a core.
TICK_SECONDS = 0.5
# Of one service: its silent pods keep no other service waiting, nor all files of the process.
MAX_ASKED_AT_ONCE = 100
# Rounds in a row that contradict what is told of the service: a pod that is slow now and then, or
# silent for one reason and for another, is no news each time.
NEWS_AFTER_ROUNDS = 3


@dataclass(slots=True)
class _Watched:
    """One service that can be scaled."""

    uid: str
    policy: ScalingPolicy
    state: ScalingState
    addresses: tuple[str, ...]
    task: asyncio.Task[None] = field(init=False)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_ASKED_AT_ONCE))
    news_rounds: int = 0
    blindness: str | None = None


@dataclass(slots=True, kw_only=True)
class Poller:
    """Knows the target of every service, and whether it can see the load of its pods.

    Pods are not trusted: whatever one answers is at most a pod without a known load.
    """

    clock: Callable[[], float]
    on_change: Callable[[Key], None]
    telemetry: Telemetry
    port: int = PORT
    _watched: dict[Key, _Watched] = field(default_factory=dict, init=False)
    reports: Reports = field(init=False)
    loads: Loads = field(init=False)
    _engines: Engines = field(init=False)

    def __post_init__(self) -> None:
        self._engines = Engines(self.port)
        self.reports = Reports(self._engines, self.on_change)
        self.loads = Loads(self._engines, self.on_change)
        self.telemetry.polled_services.set_function(lambda: len(self._watched))

    def target(self, service: LLMService, status: Manifest, deployment: Manifest | None) -> int:
        """How many replicas the service should have now."""
        policy = ScalingPolicy.of(service.spec)
        watched = self._watched.get(service.key)
        if policy is not None and watched is not None and watched.uid == service.uid:
            return policy.clamp(watched.state.target)
        return initial_target(
            service.spec,
            remembered=status.get("desiredReplicas", 0),
            live=0 if deployment is None else deployment["spec"].get("replicas", 1),
        )

    def blindness(self, key: Key) -> str | None:
        """Why scaling does not see the load of ready pods, for some time now; None if it does."""
        watched = self._watched.get(key)
        return None if watched is None else watched.blindness

    def watch(self, service: LLMService, target: int, pods: list[Manifest]) -> None:
        """Ask these pods from now on, if the service can be scaled at all."""
        policy = ScalingPolicy.of(service.spec)
        if policy is None:
            self.forget(service.key)
            return
        watched = self._watched.get(service.key)
        if watched is None or watched.uid != service.uid:
            self.forget(service.key)
            watched = _Watched(service.uid, policy, ScalingState.start(target, self.clock()), ())
            watched.task = asyncio.get_running_loop().create_task(self._poll(service.key, watched))
            self._watched[service.key] = watched
        watched.policy, watched.addresses = policy, ready_addresses(pods)
        labels = (service.key.namespace, service.key.name)
        self.telemetry.desired_replicas.labels(*labels).set(target)

    def forget(self, key: Key) -> None:
        """Stop asking the pods of a service."""
        watched = self._watched.pop(key, None)
        if watched is not None:
            watched.task.cancel()
            self.telemetry.desired_replicas.remove(key.namespace, key.name)

    async def close(self) -> None:
        tasks = [watched.task for watched in self._watched.values()]
        for key in list(self._watched):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.reports.close()
        await self.loads.close()
        await self._engines.close()

    async def _poll(self, key: Key, watched: _Watched) -> None:
        interval = BUSY_SECONDS
        while True:
            await asyncio.sleep(pause_seconds(self.clock(), interval))
            try:
                is_busy = await self._poll_once(key, watched)
            except Exception:
                # Our bug: this service is asked again, and the others never notice.
                logger.exception("%s: its pods cannot be asked", key)
                self.telemetry.poll_failures.labels(reason="error").inc()
                is_busy = False
            interval = BUSY_SECONDS if is_busy else min(interval * IDLE_FACTOR, IDLE_SECONDS)

    async def _poll_once(self, key: Key, watched: _Watched) -> bool:
        """Ask every pod and decide; whether there was anything to do for them."""
        answers = await asyncio.gather(*(self._ask(it, watched) for it in watched.addresses))
        loads = [answer if isinstance(answer, PodLoad) else None for answer in answers]
        self._note_silence(key, watched, answers)
        before = watched.state.target
        watched.state = decide(watched.state, loads, watched.policy, self.clock())
        target = watched.state.target
        if target != before:
            self.telemetry.scale_decisions.labels(
                reason=_reason(watched.policy, before, target)
            ).inc()
            logger.info("%s: %d replicas in place of %d", key, target, before)
            self.on_change(key)
        return any(load is not None and load.running + load.waiting for load in loads)

    def _note_silence(
        self, key: Key, watched: _Watched, answers: Sequence[PodLoad | Silence]
    ) -> None:
        silences = [answer for answer in answers if isinstance(answer, Silence)]
        for silence in silences:
            self.telemetry.poll_failures.labels(reason=silence.name.lower()).inc()
        words = None
        if silences:
            # The most frequent reason, and no numbers: the words are part of the status.
            reason = max(sorted(set(silences)), key=silences.count)
            who = "no" if len(silences) == len(answers) else "not every"
            words = f"{who} ready replica tells its load at /load ({reason})"
        watched.news_rounds = watched.news_rounds + 1 if words != watched.blindness else 0
        if watched.news_rounds < NEWS_AFTER_ROUNDS:
            return
        watched.news_rounds, watched.blindness = 0, words
        if watched.blindness is None:
            logger.info("%s: scaling sees the load of all ready replicas again", key)
        else:
            logger.warning("%s: scaling is blind: %s", key, watched.blindness)
        self.on_change(key)

    async def _ask(self, address: str, watched: _Watched) -> PodLoad | Silence:
        """The load of one pod, or why it is not known."""
        answer = await self._engines.read(address, "/load", watched.slots)
        if isinstance(answer, Silence):
            return answer
        return parse_load(answer) or Silence.ANSWER


def pause_seconds(now: float, interval: float) -> float:
    """How long to wait from now to the tick that is nearest to the end of the interval."""
    return round((now + interval) / TICK_SECONDS) * TICK_SECONDS - now


def _reason(policy: ScalingPolicy, before: int, target: int) -> str:
    """Why the number of replicas changes, for the metric."""
    if policy.clamp(before) != before:
        return "limits"
    return "demand" if target > before else "idle"


def parse_load(body: bytes) -> PodLoad | None:
    """The answer of `/load`; None if it is none."""
    try:
        answer = json.loads(body)
        counts = (answer["running"], answer["waiting"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_load = all(type(count) is int and count >= 0 for count in counts)
    return PodLoad(*counts) if is_load else None


def ready_addresses(pods: list[Manifest]) -> tuple[str, ...]:
    """Addresses of the pods that answer requests, for use in a URL."""
    return tuple(sorted(filter(None, map(ready_address, pods))))
