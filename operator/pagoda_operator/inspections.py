"""Runs the Jobs that read models, one after the other for each model, and hears what they tell."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pagoda_operator.checkpoint import Checkpoint, CheckpointError
from pagoda_operator.cluster import ApiError, ApiServer, Conflict
from pagoda_operator.hub import Unreadable
from pagoda_operator.inspection import DEADLINE_SECONDS, hear, render_inspection
from pagoda_operator.names import LABEL_JOB, Manifest, find_condition
from pagoda_operator.plan import is_controlled_by
from pagoda_operator.spec import LLMService

LOOK_EVERY_SECONDS = 1.0
MARGIN_SECONDS = 15.0
"""That Kubernetes takes to end what has passed its deadline."""


@dataclass(frozen=True, slots=True)
class Inspections:
    """Args:
    image: the operator's own, which the Jobs run.
    """

    cluster: ApiServer
    image: str
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def read(self, service: LLMService) -> Checkpoint | CheckpointError:
        """What a Job finds of a service's model.

        Raises:
            Unreadable: it finds nothing, or there is no Job.
        """
        job = render_inspection(service, self.image)
        try:
            return await self._run(job, service.uid)
        except ApiError as error:
            raise Unreadable(f"the API server refuses its Job: {error}") from error

    async def _run(self, job: Manifest, uid: str) -> Checkpoint | CheckpointError:
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        with contextlib.suppress(Conflict):
            # There is one if an earlier operator began it.
            await self.cluster.write(job)
        await self._wait(namespace, name, uid)
        pods = await self.cluster.list("Pod", namespace, f"{LABEL_JOB}={name}")
        live = await self.cluster.get("Job", namespace, name)
        if live is not None:
            await self.cluster.delete(live)
        lines = [_message(pod) for pod in pods]
        for line in lines:
            if (found := hear(line)) is not None:
                return found
        why = next(filter(None, lines), "it did not end in time")
        raise Unreadable(f"the Job {name} told nothing of it: {why:.300}")

    async def _wait(self, namespace: str, name: str, uid: str) -> None:
        """Until the Job has ended, or should have."""
        for _ in range(int((DEADLINE_SECONDS + MARGIN_SECONDS) / LOOK_EVERY_SECONDS)):
            live = await self.cluster.get("Job", namespace, name)
            if live is None or not is_controlled_by(live, uid):
                raise Unreadable(f"the Job {name} is gone, or another's")
            status = live.get("status", {})
            done = [find_condition(status, kind).get("status") for kind in ("Complete", "Failed")]
            if "True" in done:
                return
            await self.sleep(LOOK_EVERY_SECONDS)


def _message(pod: Manifest) -> str:
    for status in pod.get("status", {}).get("containerStatuses", []):
        if (ended := status.get("state", {}).get("terminated")) is not None:
            return str(ended.get("message", ""))
    return ""
