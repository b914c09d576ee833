"""What users do with an LLMService, from a state that has settled to another one."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from faults.api import Api, Manifest
from faults.world import World, wait_until

STEP_SECONDS = 120.0
FIRST_IMAGE, NEXT_IMAGE = "pagoda.invalid/engine:1", "pagoda.invalid/engine:2"
_MASKED = (
    *("uid", "resourceVersion", "creationTimestamp", "managedFields", "lastTransitionTime"),
    *("clusterIP", "clusterIPs", "deletionTimestamp", "deletionGracePeriodSeconds"),
)
_COUNTS = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")


@dataclass(frozen=True, slots=True)
class Case:
    """One LLMService of the bench."""

    api: Api
    world: World
    namespace: str
    name: str

    async def create(self, **spec: Any) -> None:
        await self.api.create(
            {
                "apiVersion": "pagoda.dev/v1alpha1",
                "kind": "LLMService",
                "metadata": {"name": self.name, "namespace": self.namespace},
                "spec": {"model": {"uri": "hf://org/model"}, **spec},
            }
        )

    async def edit(self, **spec: Any) -> None:
        await self.patch("LLMService", self.name, {"spec": spec})

    async def patch(self, kind: str, name: str, patch: Manifest) -> None:
        before = self._version(kind, name)
        await self.api.patch(kind, self.namespace, name, patch)
        await self._until_seen(kind, name, before)

    async def delete(self, kind: str = "LLMService", name: str = "") -> None:
        before = self._version(kind, name or self.name)
        await self.api.delete(kind, self.namespace, name or self.name)
        await self._until_seen(kind, name or self.name, before)

    def _version(self, kind: str, name: str) -> str:
        found = self.world.get(kind, self.namespace, name) or {"metadata": {}}
        return str(found["metadata"].get("resourceVersion"))

    async def _until_seen(self, kind: str, name: str, before: str) -> None:
        """What was good before the act would pass for what is good again after it."""
        await self.until(f"a new {kind}", lambda: self._version(kind, name) != before)

    async def until(self, what: str, check: Callable[[], Any]) -> None:
        await wait_until(check, STEP_SECONDS, f"{self.name}: {what}")

    async def until_ready(self) -> None:
        await self.until("Ready", lambda: self.says("Ready") and self.has_pods(1))

    @property
    def engine(self) -> str:
        return f"{self.name}-engine"

    @property
    def service(self) -> Manifest:
        return self.world.get("LLMService", self.namespace, self.name) or {}

    @property
    def deployment(self) -> Manifest:
        return self.world.get("Deployment", self.namespace, self.engine) or {}

    @property
    def front(self) -> Manifest:
        return self.world.get("Service", self.namespace, self.name) or {}

    @property
    def container(self) -> Manifest:
        if not self.deployment:
            return {}
        return dict(self.deployment["spec"]["template"]["spec"]["containers"][0])

    @property
    def arguments(self) -> str:
        return " ".join(self.container.get("args", ())) + " "

    def says(self, kind: str, reason: str = "") -> bool:
        """Whether the condition is true, of the present spec, for the reason."""
        service = self.service
        conditions: list[Manifest] = service.get("status", {}).get("conditions", [])
        found = next((it for it in conditions if it["type"] == kind), None)
        if found is None:
            return False
        is_current = found["observedGeneration"] == service["metadata"]["generation"]
        return bool(is_current and found["status"] == "True" and reason in found["reason"])

    def has_pods(self, number: int) -> bool:
        return bool(self.deployment.get("status", {}).get("readyReplicas", 0) == number)


def state_of(case: Case) -> str:
    """Everything of a service, without what differs from run to run, as text to compare."""
    service = case.service
    uid = service.get("metadata", {}).get("uid", "none")
    objects: dict[str, Any] = {"LLMService": service}
    pods = []
    for kind, manifest in case.world.of_service(case.namespace, case.name):
        if kind == "Pod":
            pods.append("deletionTimestamp" in manifest["metadata"])
            continue
        name = manifest["metadata"]["name"]
        objects[f"{kind}/{name}"] = _without_counters(kind, manifest)
    revision = service.get("status", {}).get("revision", "none")
    text = json.dumps({"objects": _mask(objects, uid), "pods leave": pods}, sort_keys=True)
    names = ((revision, "REVISION"), (case.namespace, "NAMESPACE"), (case.name, "NAME"))
    for name, mask in names:
        text = text.replace(name, mask)
    return text


def _without_counters(kind: str, manifest: Manifest) -> Manifest:
    """Of the status of a child the counts; the generation counts edits by hand, and ours.

    So does a Deployment's revision: of what was refused and then corrected there is none.
    """
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "generation"}
    if kind == "Deployment":
        counted = "deployment.kubernetes.io/revision"
        kept = {key: it for key, it in metadata["annotations"].items() if key != counted}
        metadata["annotations"] = kept
    found = {**manifest, "metadata": metadata}
    status = found.pop("status", {})
    if kind == "Deployment":
        found["status"] = {key: status.get(key, 0) for key in _COUNTS}
    return found


def _mask(value: Any, owner: str) -> Any:
    if isinstance(value, dict):
        if value.get("uid") == owner and "controller" in value:
            value = {**value, "owner": "this one"}
        elif "controller" in value:
            value = {**value, "owner": value.get("uid")}
        return {key: _mask(item, owner) for key, item in value.items() if key not in _MASKED}
    if isinstance(value, list):
        return [_mask(item, owner) for item in value]
    return value


Step = Callable[[Case], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """prepare: up to where faults begin. act: what users do then. goal: when all of it is done."""

    name: str
    prepare: Step
    act: Step
    goal: Callable[[Case], bool]


async def _nothing(_: Case) -> None:
    pass


async def _serve(case: Case) -> None:
    await case.create()
    await case.until_ready()


async def _create(case: Case) -> None:
    await case.create()


async def _change_image(case: Case) -> None:
    await case.edit(engine={"image": NEXT_IMAGE})


async def _scale(case: Case) -> None:
    await case.edit(replicas=3)
    await case.until("three", lambda: case.has_pods(3) and case.says("Ready"))
    await case.edit(replicas=1)


async def _edit_twice(case: Case) -> None:
    made = case.world.num_pods_made(case.namespace, case.name)
    await case.edit(engine={"maxNumSeqs": 7})
    await case.until(
        "a pod of the first edit",
        lambda: case.world.num_pods_made(case.namespace, case.name) > made,
    )
    await case.edit(engine={"maxNumSeqs": 9})


async def _break_and_mend(case: Case) -> None:
    # No schema can know that there is no such class: the pods are refused.
    await case.edit(podTemplate={"priorityClassName": "nowhere"})
    await case.until("Stalled", lambda: case.says("Stalled"))
    await case.edit(podTemplate=None, engine={"maxNumSeqs": 9})


async def _delete_children(case: Case) -> None:
    await case.delete("Service")
    await case.delete("Deployment", case.engine)
    await case.delete("ServiceAccount", case.engine)


async def _edit_children(case: Case) -> None:
    ports = [{"name": "http", "port": 81, "protocol": "TCP", "targetPort": 1}]
    await case.patch("Service", case.name, {"spec": {"ports": ports}})
    await case.patch("Deployment", case.engine, {"spec": {"revisionHistoryLimit": 7}})
    labels = {"pagoda.dev/service": "another"}
    await case.patch("ServiceAccount", case.engine, {"metadata": {"labels": labels}})


def _are_children_mended(case: Case) -> bool:
    account = case.world.get("ServiceAccount", case.namespace, case.engine) or {"metadata": {}}
    return (
        bool(case.front and case.deployment)
        and case.front["spec"]["ports"][0]["port"] == 80
        and case.deployment["spec"]["revisionHistoryLimit"] == 3
        and account["metadata"].get("labels", {}).get("pagoda.dev/service") == case.name
    )


async def _occupy(case: Case) -> None:
    await case.api.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": case.name, "namespace": case.namespace},
            "spec": {"ports": [{"port": 5}]},
        }
    )


async def _create_and_clear(case: Case) -> None:
    await case.create()
    await case.until("the conflict", lambda: case.says("Stalled", "NameConflict"))
    await case.delete("Service")


async def _make_anew(case: Case) -> None:
    await case.delete()
    await case.create(engine={"maxNumSeqs": 7})


def _shows(*parts: str, pods: int = 1) -> Callable[[Case], bool]:
    """Ready, with so many pods, and with these among the arguments and the image."""

    def is_so(case: Case) -> bool:
        told = f"{case.arguments} {case.container.get('image')} "
        is_right = all(f" {part} " in f" {told}" for part in parts)
        return is_right and case.says("Ready") and case.has_pods(pods)

    return is_so


SCENARIOS = (
    Scenario("create", _nothing, _create, _shows(FIRST_IMAGE)),
    Scenario("image change", _serve, _change_image, _shows(NEXT_IMAGE)),
    Scenario("scale", _serve, _scale, _shows(FIRST_IMAGE)),
    Scenario("spec edit during rollout", _serve, _edit_twice, _shows("--max-num-seqs 9")),
    Scenario("invalid, then fixed", _serve, _break_and_mend, _shows("--max-num-seqs 9")),
    Scenario(
        "child deleted",
        _serve,
        _delete_children,
        lambda case: _are_children_mended(case) and _shows()(case),
    ),
    Scenario(
        "child edited",
        _serve,
        _edit_children,
        lambda case: _are_children_mended(case) and _shows()(case),
    ),
    Scenario("name conflict", _occupy, _create_and_clear, _shows(FIRST_IMAGE)),
    Scenario("delete and recreate", _serve, _make_anew, _shows("--max-num-seqs 7")),
)
