"""What is in the cluster, kept up to date by watches, and a kubelet that makes its pods ready."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from faults.api import WATCHED, Api, ApiRefused, Manifest, path_of

LABEL = "pagoda.dev/service"
NODES = ("bench-1", "bench-2")
READY_AFTER_SECONDS = 0.1
HEARTBEAT_SECONDS = 10.0
Place = tuple[str, str]
"""namespace, name"""


class World:
    """`async with World(api)`: live objects by kind; pods that were ever there, by service."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.objects: dict[str, dict[Place, Manifest]] = {kind: {} for kind in WATCHED}
        self.pods_made: defaultdict[Place, dict[str, str]] = defaultdict(dict)
        """(namespace, service) → uid of each pod → its revision."""
        self._of_service: defaultdict[Place, set[tuple[str, Place]]] = defaultdict(set)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._played: set[tuple[str, bool]] = set()

    async def __aenter__(self) -> World:
        for name in NODES:
            await self._api.create(_node(name), may_exist=True)
        self._spawn(self._heartbeat())
        for kind in WATCHED:
            self._spawn(self._watch(kind))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        return self.objects[kind].get((namespace, name))

    def of_service(self, namespace: str, name: str) -> list[tuple[str, Manifest]]:
        """(kind, object) of everything that is labelled with a service."""
        found = sorted(self._of_service[namespace, name])
        return [(kind, self.objects[kind][place]) for kind, place in found]

    def num_pods_made(self, namespace: str, name: str) -> int:
        return len(self.pods_made[namespace, name])

    async def _watch(self, kind: str) -> None:
        def on_event(what: str, manifest: Manifest) -> None:
            if what == "LISTED":
                found = {_place(item): item for item in manifest["items"]}
                for place in set(self.objects[kind]) - set(found):
                    self._remove(kind, place)
                for item in found.values():
                    self._put(kind, item)
            elif what == "DELETED":
                self._remove(kind, _place(manifest))
            else:
                self._put(kind, manifest)

        await self._api.watch(kind, on_event)

    def _put(self, kind: str, manifest: Manifest) -> None:
        place = _place(manifest)
        self._remove(kind, place)
        self.objects[kind][place] = manifest
        if service := _service(manifest):
            owner = (place[0], service)
            self._of_service[owner].add((kind, place))
            if kind == "Pod":
                labels = manifest["metadata"]["labels"]
                made = self.pods_made[owner]
                made[manifest["metadata"]["uid"]] = labels.get("pagoda.dev/revision", "")
        if kind == "Pod":
            self._play(manifest)

    def _remove(self, kind: str, place: Place) -> None:
        before = self.objects[kind].pop(place, None)
        if before is not None and (service := _service(before)):
            self._of_service[place[0], service].discard((kind, place))

    def _play(self, pod: Manifest) -> None:
        """Do for a pod what its kubelet would, once."""
        if pod["spec"].get("nodeName") not in NODES:
            return
        is_leaving = "deletionTimestamp" in pod["metadata"]
        key = (pod["metadata"]["uid"], is_leaving)
        if key not in self._played:
            self._played.add(key)
            self._spawn(self._end(pod) if is_leaving else self._make_ready(pod))

    async def _make_ready(self, pod: Manifest) -> None:
        await asyncio.sleep(READY_AFTER_SECONDS)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        names = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        conditions = [{"type": it, "status": "True", "lastTransitionTime": now} for it in names]
        containers = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
            for container in pod["spec"]["containers"]
        ]
        status = {"phase": "Running", "conditions": conditions, "containerStatuses": containers}
        with suppress(ApiRefused):
            await self._api.patch("Pod", *_place(pod), {"status": status}, "/status")

    async def _end(self, pod: Manifest) -> None:
        uid = {"uid": pod["metadata"]["uid"]}
        namespace, name = _place(pod)
        await self._api.delete("Pod", namespace, name, gracePeriodSeconds=0, preconditions=uid)

    async def _heartbeat(self) -> None:
        while True:
            for name in NODES:
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                room = {"cpu": "10000", "memory": "100Ti", "pods": "10000"}
                room |= {"nvidia.com/gpu": "10000", "ephemeral-storage": "1000Ti"}
                ready = {"type": "Ready", "status": "True", "reason": "Bench", "message": ""}
                ready |= {"lastHeartbeatTime": now, "lastTransitionTime": now}
                status = {"capacity": room, "allocatable": room, "conditions": [ready]}
                path = path_of("Node", name=name) + "/status"
                with suppress(ApiRefused):
                    content_type = "application/merge-patch+json"
                    await self._api.request("PATCH", path, {"status": status}, content_type)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def wait_until(
    check: Any, timeout_seconds: float, what: str = "", interval_seconds: float = 0.05
) -> float:
    """Wait for a true value; returns when it was. Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_seconds
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_seconds:.0f} s: {what}")
        await asyncio.sleep(interval_seconds)
    return time.monotonic()


def _place(manifest: Manifest) -> Place:
    metadata = manifest["metadata"]
    return metadata["namespace"], metadata["name"]


def _service(manifest: Manifest) -> str:
    return str(manifest["metadata"].get("labels", {}).get(LABEL, ""))


def _node(name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
