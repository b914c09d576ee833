"""Asks engines for their load, and keeps what the autoscaler has decided.

Each service whose replicas can change has one task: it asks all ready pods at once, every
BUSY_SECONDS while there is demand and less and less often (up to IDLE_SECONDS) while there is none.
When the decision changes, the service is put in the queue; the reconciler writes the replicas.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from pagoda_operator.causes import is_ready
from pagoda_operator.flags import PORT
from pagoda_operator.names import Key, Manifest
from pagoda_operator.scaling import (
    PodLoad,
    ScalingPolicy,
    ScalingState,
    decide,
    initial_target,
)
from pagoda_operator.spec import LLMService
from pagoda_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
IDLE_SECONDS = 5.0
IDLE_FACTOR = 1.25
ANSWER_SECONDS = 2.0
# /load is a line of JSON; what is longer is no engine of ours.
MAX_ANSWER_BYTES = 16384


@dataclass(slots=True)
class _Watched:
    """One service that can be scaled."""

    uid: str
    policy: ScalingPolicy
    state: ScalingState
    addresses: tuple[str, ...]
    task: asyncio.Task[None] | None = None


class Poller:
    """Knows the target of every service."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        on_change: Callable[[Key], None],
        telemetry: Telemetry,
        port: int = PORT,
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self._telemetry = telemetry
        self._port = port
        self._watched: dict[Key, _Watched] = {}
        self._session: aiohttp.ClientSession | None = None

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

    def watch(self, service: LLMService, target: int, pods: list[Manifest]) -> None:
        """Ask these pods from now on, if the service can be scaled at all."""
        policy = ScalingPolicy.of(service.spec)
        if policy is None:
            self.forget(service.key)
            return
        addresses = ready_addresses(pods)
        watched = self._watched.get(service.key)
        if watched is not None and watched.uid == service.uid:
            watched.policy, watched.addresses = policy, addresses
            return
        self.forget(service.key)
        state = ScalingState.start(target, self._clock())
        watched = _Watched(service.uid, policy, state, addresses)
        watched.task = asyncio.get_running_loop().create_task(self._poll(service.key, watched))
        self._watched[service.key] = watched

    def forget(self, key: Key) -> None:
        """Stop asking the pods of a service."""
        watched = self._watched.pop(key, None)
        if watched is not None and watched.task is not None:
            watched.task.cancel()

    async def close(self) -> None:
        """Stop everything."""
        tasks = [watched.task for watched in self._watched.values() if watched.task is not None]
        for key in list(self._watched):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _poll(self, key: Key, watched: _Watched) -> None:
        interval = BUSY_SECONDS
        while True:
            await asyncio.sleep(interval)
            loads = await asyncio.gather(*(self._ask(address) for address in watched.addresses))
            before = watched.state.target
            watched.state = decide(watched.state, loads, watched.policy, self._clock())
            target = watched.state.target
            if target != before:
                direction = "up" if target > before else "down"
                self._telemetry.scale_decisions.labels(direction=direction).inc()
                logger.info("%s: %d replicas in place of %d", key, target, before)
                self._on_change(key)
            is_busy = any(load is not None and load.running + load.waiting for load in loads)
            interval = BUSY_SECONDS if is_busy else min(interval * IDLE_FACTOR, IDLE_SECONDS)

    async def _ask(self, address: str) -> PodLoad | None:
        """The load of one pod; None if it does not answer as an engine does."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
            # No proxy of the environment: pods are reached directly.
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        try:
            async with self._session.get(f"http://{address}:{self._port}/load") as response:
                if response.status != 200:
                    return None
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        return None
                return parse_load(bytes(body))
        except (TimeoutError, OSError, aiohttp.ClientError):
            return None


def parse_load(body: bytes) -> PodLoad | None:
    """The answer of `/load`; None if it is none."""
    try:
        answer = json.loads(body)
        load = PodLoad(answer["running"], answer["waiting"])
    except (ValueError, TypeError, KeyError):
        return None
    counts = (load.running, load.waiting)
    return load if all(type(count) is int and count >= 0 for count in counts) else None


def ready_addresses(pods: list[Manifest]) -> tuple[str, ...]:
    """Addresses of the pods that answer requests, for use in a URL."""
    addresses = (
        str(pod["status"]["podIP"])
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"]
        and is_ready(pod)
        and pod["status"].get("podIP")
    )
    return tuple(sorted(f"[{ip}]" if ":" in ip else ip for ip in addresses))
