"""What tests of the operator share: services, pods, and an API server in memory.

The in-memory server knows what the reconciler relies on: uids, generations, who owns
`spec.replicas`, forced and unforced applies. It is no substitute for the tests in `e2e/`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Mapping
from typing import Any

from pagoda_operator.cluster import ApiServer, Conflict, NotFound
from pagoda_operator.names import API_VERSION, KIND, LABEL_REVISION, Key, Manifest, common_labels
from pagoda_operator.poll import Poller
from pagoda_operator.spec import LLMService, parse
from pagoda_operator.telemetry import Telemetry

KEY = Key("team", "chat")
LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
"""A config.json."""


def make_manifest(spec: Mapping[str, Any] | None = None, *, generation: int = 1) -> Manifest:
    """An LLMService as the API server returns it; `spec` is merged over the least one."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": KEY.name,
            "namespace": KEY.namespace,
            "uid": "uid-of-chat",
            "generation": generation,
        },
        "spec": {"model": {"uri": "pvc://models/gemma"}, **(spec or {})},
    }


def make_service(spec: Mapping[str, Any] | None = None, *, generation: int = 1) -> LLMService:
    """The same, parsed."""
    return parse(make_manifest(spec, generation=generation))


def make_pod(
    revision: str,
    *,
    name: str = "pod-1",
    ready: bool = False,
    ip: str = "10.0.0.1",
    container: Mapping[str, Any] | None = None,
    unschedulable: str | None = None,
) -> Manifest:
    """A pod of the service; `container` is merged into its container status."""
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    status: Manifest = {"phase": "Running", "podIP": ip, "conditions": conditions}
    if unschedulable is None:
        waiting = {"name": "engine", "image": "img:1", "restartCount": 0, "state": {"running": {}}}
        status["containerStatuses"] = [{**waiting, **(container or {})}]
    else:
        status["phase"] = "Pending"
        reason = {"type": "PodScheduled", "status": "False", "message": unschedulable}
        conditions.append(reason)
    labels = {**common_labels(KEY.name), LABEL_REVISION: revision}
    return {"kind": "Pod", "metadata": {"name": name, "labels": labels}, "status": status}


def make_poller() -> Poller:
    """One whose news nobody hears, by the clock of the running loop."""
    clock = asyncio.get_running_loop().time
    return Poller(clock=clock, on_change=lambda key: None, telemetry=Telemetry())


def set_deployment_status(deployment: Manifest, *, ready: int, updated: int, total: int) -> None:
    """Let a Deployment say that its present spec has so many pods."""
    deployment["metadata"].setdefault("generation", 1)
    deployment["status"] = {
        "observedGeneration": deployment["metadata"]["generation"],
        "replicas": total,
        "updatedReplicas": updated,
        "readyReplicas": ready,
        "availableReplicas": ready,
    }


def kstatus(manifest: Manifest) -> str:
    """What kstatus (Flux, Helm, kpt) makes of a custom resource, by its rules in their order."""
    metadata, status = manifest["metadata"], manifest.get("status", {})
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    generations = metadata.get("generation"), status.get("observedGeneration")
    if None not in generations and generations[0] != generations[1]:
        return "InProgress"
    conditions = status.get("conditions", [])
    for condition in conditions:
        if condition["type"] == "Reconciling" and condition["status"] == "True":
            return "InProgress"
        if condition["type"] == "Stalled" and condition["status"] == "True":
            return "Failed"
    ready = (it["status"] for it in conditions if it["type"] == "Ready")
    return "Current" if next(ready, "True") == "True" else "InProgress"


class MemoryCluster(ApiServer):
    """An API server in memory. `writes` lists (verb, kind, name) of every write but events, which
    are in `told`."""

    def __init__(self) -> None:
        super().__init__(client=None, telemetry=Telemetry())
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.writes: list[tuple[str, str, str]] = []
        self.told: list[Manifest] = []
        self._numbers = itertools.count(1)

    def put(self, manifest: Manifest) -> Manifest:
        """Place an object as somebody else would."""
        stored = copy.deepcopy(manifest)
        stored["metadata"].setdefault("uid", f"uid-{next(self._numbers)}")
        stored["metadata"].setdefault("resourceVersion", str(next(self._numbers)))
        self.objects[stored["kind"], stored["metadata"]["name"]] = stored
        return stored

    def find(self, kind: str, name: str) -> Manifest:
        return self.objects[kind, name]

    def edit(self, spec: Mapping[str, Any], generation: int) -> None:
        """Change the spec of the service as a user does; the status stays."""
        status = self.find(KIND, KEY.name).get("status")
        changed = make_manifest(spec, generation=generation)
        self.put(changed | ({"status": status} if status else {}))

    def condition(self, kind: str) -> Manifest:
        """A condition of the service, which has it."""
        conditions = self.find(KIND, KEY.name)["status"]["conditions"]
        return next(dict(entry) for entry in conditions if entry["type"] == kind)

    def reason(self, kind: str = "Ready") -> str:
        return str(self.condition(kind)["reason"])

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        return copy.deepcopy(self.objects.get((kind, name)))

    async def list(
        self, kind: str, namespace: str | None, selector: str = "", fields: str = ""
    ) -> list[Manifest]:
        label, _, value = selector.partition("=")
        return [
            copy.deepcopy(item)
            for (item_kind, _), item in sorted(self.objects.items())
            if item_kind == kind
            and (not selector or item["metadata"].get("labels", {}).get(label) == value)
        ]

    async def apply(self, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
        kind, metadata = manifest["kind"], manifest["metadata"]
        live = self.objects.get((kind, metadata["name"]))
        if live is None and "uid" in metadata:
            raise Conflict("uid mismatch")
        if live is not None and not force:
            raise Conflict("conflict")
        self.writes.append(("apply", kind, metadata["name"]))
        stored = live or {"metadata": {}}
        before = copy.deepcopy(stored.get("spec"))
        stored["metadata"] |= {
            "uid": f"uid-{next(self._numbers)}",
            "generation": 0,
            "managedFields": [],
            **stored["metadata"],
            **metadata,
            "resourceVersion": str(next(self._numbers)),
        }
        for key, value in manifest.items():
            if key == "spec":
                stored["spec"] = {**stored.get("spec", {}), **copy.deepcopy(value)}
            elif key != "metadata":
                stored[key] = value
        self._note_owner(stored, manifest, manager)
        stored["metadata"]["generation"] += before != stored.get("spec")
        self.objects[kind, metadata["name"]] = stored
        return copy.deepcopy(stored)

    async def set_managed_fields(self, manifest: Manifest, metadata: Manifest) -> None:
        stored = self.find(manifest["kind"], manifest["metadata"]["name"])["metadata"]
        if stored["resourceVersion"] != metadata["resourceVersion"]:
            raise Conflict("resourceVersion mismatch")
        stored["managedFields"] = copy.deepcopy(metadata["managedFields"])

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        key = (manifest["kind"], manifest["metadata"]["name"])
        if key not in self.objects:
            raise NotFound("not found")
        self.writes.append(("status", *key))
        self.objects[key]["status"] = copy.deepcopy(manifest["status"])
        return copy.deepcopy(self.objects[key])

    async def create_event(self, event: Manifest) -> None:
        if all(it["metadata"]["name"] != event["metadata"]["name"] for it in self.told):
            self.told.append(copy.deepcopy(event))

    async def delete(self, live: Manifest) -> None:
        key = (live["kind"], live["metadata"]["name"])
        stored = self.objects.get(key)
        if stored is not None and stored["metadata"]["uid"] != live["metadata"]["uid"]:
            raise Conflict("uid mismatch")
        self.writes.append(("delete", *key))
        self.objects.pop(key, None)

    def _note_owner(self, stored: Manifest, manifest: Manifest, manager: str) -> None:
        """managedFields, as far as `spec.replicas` goes: the last one to set it owns it."""
        if "replicas" not in manifest.get("spec", {}):
            return
        entry = {"manager": manager, "operation": "Apply"}
        stored["metadata"]["managedFields"] = [
            {**entry, "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        ]
