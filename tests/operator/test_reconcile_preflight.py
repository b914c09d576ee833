"""Passes of services whose model is checked before their pods are made or changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from pagoda_operator.checkpoint import Tensors
from pagoda_operator.checks import Checks
from pagoda_operator.hub import Answer, Hub, Unreachable
from pagoda_operator.names import Manifest
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.testing import (
    KEY,
    LLAMA_8B,
    MemoryCluster,
    make_manifest,
    make_poller,
    set_deployment_status,
)

TOO_LONG = {"maxModelLen": 100_000}
FITTING = {"maxModelLen": 8192}


class OneModel(Hub):
    """A hub with the same config.json for every name."""

    def __init__(self) -> None:
        super().__init__("https://hub")
        self.answer: Mapping[str, Any] | Exception = LLAMA_8B
        self.num_asked = 0

    async def read(self, name: str, revision: str | None, etag: str | None = None) -> Answer | None:
        self.num_asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return Answer(self.answer, Tensors())


class World:
    """An API server in memory with one service, and an operator."""

    def __init__(self) -> None:
        self.cluster, self.hub, self.generation = MemoryCluster(), OneModel(), 0
        self.start_operator()

    def start_operator(self) -> None:
        clock = asyncio.get_running_loop().time
        self.reconciler = Reconciler(
            self.cluster,
            make_poller(),
            engine_image="engine:1",
            checks=Checks(self.hub, clock, lambda key: None),
            now=lambda: datetime(2026, 11, 26, tzinfo=UTC),
        )

    def apply(self, uri: str = "hf://org/model", **engine: Any) -> None:
        self.generation += 1
        spec = {
            "model": {"uri": uri},
            "engine": engine,
            "resources": {"gpu": {"products": ["NVIDIA-L4"]}},
        }
        manifest = make_manifest(spec, generation=self.generation)
        live = self.cluster.objects.get(("LLMService", KEY.name), {})
        self.cluster.put(manifest | ({"status": live["status"]} if "status" in live else {}))

    async def settle(self) -> None:
        """Passes until nothing is written any more."""
        for _ in range(10):
            count = len(self.cluster.writes)
            await self.reconciler.reconcile(KEY)
            await asyncio.sleep(0)
            if len(self.cluster.writes) == count:
                await self.reconciler.reconcile(KEY)
                if len(self.cluster.writes) == count:
                    return
        raise AssertionError("it never settles")

    @property
    def status(self) -> Manifest:
        found: Manifest = self.cluster.find("LLMService", KEY.name)["status"]
        return found

    @property
    def has_pods(self) -> bool:
        return ("Deployment", "chat-engine") in self.cluster.objects

    def reason(self, kind: str = "Stalled") -> tuple[str, str]:
        (found,) = (it for it in self.status["conditions"] if it["type"] == kind)
        return found["status"], found["reason"]

    def argument(self) -> str:
        spec = self.cluster.find("Deployment", "chat-engine")["spec"]["template"]["spec"]
        args: list[str] = spec["containers"][0]["args"]
        return args[args.index("--max-model-len") + 1]


@pytest.fixture
async def world() -> World:
    return World()


async def test_no_pod_is_made_of_what_does_not_fit_and_the_status_says_so(world: World) -> None:
    world.apply(**TOO_LONG)
    await world.settle()
    assert not world.has_pods
    assert world.reason() == ("True", "DoesNotFit")
    assert world.status["preflight"]["result"] == "Failed"


async def test_a_spec_that_was_mended_gets_its_pods(world: World) -> None:
    world.apply(**TOO_LONG)
    await world.settle()
    world.apply(**FITTING)
    await world.settle()
    assert world.has_pods
    assert world.reason()[0] == "False"
    assert world.status["preflight"]["result"] == "Passed"
    assert world.hub.num_asked == 1


async def test_pods_that_serve_go_on_when_a_change_would_not_fit(world: World) -> None:
    world.apply(**FITTING)
    await world.settle()
    deployment = world.cluster.find("Deployment", "chat-engine")
    set_deployment_status(deployment, ready=1, updated=1, total=1)
    world.apply(**TOO_LONG)
    await world.settle()
    assert world.argument() == "8192"
    assert world.reason() == ("True", "DoesNotFit")
    assert world.reason("Available")[0] == "True"
    world.apply(**FITTING)
    await world.settle()
    assert world.reason()[0] == "False"
    assert world.status.get("preflight", {}).get("result") != "Failed"


async def test_a_change_that_was_taken_back_while_no_operator_ran_leaves_nothing(
    world: World,
) -> None:
    world.apply(**FITTING)
    await world.settle()
    world.apply(**TOO_LONG)
    await world.settle()
    assert world.status["preflight"]["result"] == "Failed"
    world.start_operator()
    world.apply(**FITTING)
    await world.settle()
    assert "preflight" not in world.status
    assert world.reason()[0] == "False"


async def test_nothing_is_read_for_pods_that_are_there(world: World) -> None:
    world.apply(**FITTING)
    await world.settle()
    told, count = world.status["preflight"], len(world.cluster.writes)
    world.start_operator()
    await world.settle()
    assert world.hub.num_asked == 1
    assert world.status["preflight"] == told
    # The first pass of an operator applies once what it does not know to be applied.
    assert all(kind != "status" for kind, *_ in world.cluster.writes[count:])


async def test_a_refused_service_is_refused_by_the_next_operator_as_well(world: World) -> None:
    world.apply(**TOO_LONG)
    await world.settle()
    world.start_operator()
    await world.settle()
    assert not world.has_pods
    assert world.reason() == ("True", "DoesNotFit")


async def test_a_hub_that_does_not_answer_is_a_warning(world: World) -> None:
    world.hub.answer = Unreachable("no answer")
    world.apply(**TOO_LONG)
    await world.settle()
    assert world.has_pods
    assert world.status["preflight"]["result"] == "Unchecked"
    assert "no answer" in world.status["preflight"]["warnings"][0]


async def test_a_service_says_that_its_model_is_being_looked_at(world: World) -> None:
    async def never(name: str, revision: str | None, etag: str | None = None) -> Answer | None:
        await asyncio.sleep(60)
        return None

    world.hub.read = never  # type: ignore[method-assign]
    world.apply(**FITTING)
    await world.settle()
    assert not world.has_pods
    assert world.reason("Reconciling") == ("True", "CheckingModel")
    assert world.reconciler.checks is not None
    await world.reconciler.checks.close()


async def test_a_model_on_a_claim_takes_the_place_of_what_was_found_of_another(
    world: World,
) -> None:
    world.apply(**FITTING)
    await world.settle()
    world.apply("pvc://claim/model", **FITTING)
    await world.settle()
    assert world.has_pods
    assert world.status["preflight"]["result"] == "Unchecked"
