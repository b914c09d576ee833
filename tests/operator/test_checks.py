"""What is asked of a hub, and when: the hub is one in memory that counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pagoda_operator import checks as module
from pagoda_operator.checkpoint import Tensors
from pagoda_operator.checks import FRESH_SECONDS, UNREACHABLE_SECONDS, Checks, Verdict
from pagoda_operator.hub import Answer, Hub, Unreachable, Unreadable
from pagoda_operator.names import Key
from pagoda_operator.spec import LLMService
from pagoda_operator.testing import KEY, LLAMA_8B, make_service

ENDPOINT = "https://hub"


class CountingHub(Hub):
    """Answers with a config.json, or fails with an error; None: as it was."""

    def __init__(self) -> None:
        super().__init__(ENDPOINT)
        self.answer: Mapping[str, Any] | Exception | None = LLAMA_8B
        self.asked: list[tuple[str, str | None, str | None]] = []

    async def read(self, name: str, revision: str | None, etag: str | None = None) -> Answer | None:
        self.asked.append((name, revision, etag))
        if isinstance(self.answer, Exception):
            raise self.answer
        return None if self.answer is None else Answer(self.answer, Tensors(), '"1"')


class World:
    """Checks with a clock that stands still, and who was told of a change."""

    def __init__(self) -> None:
        self.hub, self.now, self.told = CountingHub(), 1000.0, list[Key]()
        self.checks = Checks(self.hub, lambda: self.now, self.told.append)

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def judge(self, service: LLMService | None = None) -> Verdict:
        """The verdict once the model is read."""
        self.checks.judge(service or serving())
        await self.settle()
        return self.checks.judge(service or serving())


@pytest.fixture
def world() -> World:
    return World()


def serving(product: str = "NVIDIA-L4", model: Mapping[str, Any] | None = None, **spec: Any) -> Any:
    uri = {"uri": "hf://org/model", **(model or {})}
    return make_service({"model": uri, "resources": {"gpu": {"products": [product]}}, **spec})


async def test_the_first_reading_is_waited_for_and_its_end_is_told(world: World) -> None:
    first = world.checks.judge(serving())
    assert first.cause is not None
    assert (first.cause.reason, first.cause.is_stalled) == ("CheckingModel", False)
    assert world.told == []
    await world.settle()
    assert world.told == [KEY]
    verdict = world.checks.judge(serving())
    assert verdict.cause is None
    assert verdict.fields is not None
    assert verdict.fields["result"] == "Passed"
    assert world.hub.asked == [("org/model", None, None)]


async def test_what_does_not_fit_stops_the_pods(world: World) -> None:
    verdict = await world.judge(serving(engine={"maxModelLen": 100_000}))
    assert verdict.cause is not None
    assert (verdict.cause.reason, verdict.cause.is_stalled) == ("DoesNotFit", True)
    assert verdict.fields is not None
    assert verdict.fields["result"] == "Failed"


async def test_a_model_is_read_once_for_all_its_services_and_again_with_its_etag(
    world: World,
) -> None:
    for _ in range(5):
        await world.judge()
    assert len(world.hub.asked) == 1
    world.now += FRESH_SECONDS + 1
    world.hub.answer = None
    assert (await world.judge()).cause is None
    assert world.hub.asked[1:] == [("org/model", None, '"1"')]
    await world.judge()
    assert len(world.hub.asked) == 2


async def test_another_name_or_secret_is_no_other_model(world: World) -> None:
    await world.judge()
    await world.judge(serving(model={"name": "other", "credentialsSecretRef": {"name": "x"}}))
    assert len(world.hub.asked) == 1


async def test_another_revision_is_another_model(world: World) -> None:
    await world.judge()
    await world.judge(serving(model={"revision": "v2"}))
    assert [revision for _, revision, _ in world.hub.asked] == [None, "v2"]


async def test_a_model_that_was_mended_is_told_of(world: World) -> None:
    world.hub.answer = {**LLAMA_8B, "architectures": ["GPT2LMHeadModel"]}
    verdict = await world.judge()
    assert verdict.cause is not None
    assert verdict.cause.reason == "UnsupportedArchitecture"
    world.told.clear()
    world.hub.answer = LLAMA_8B
    world.now += FRESH_SECONDS + 1
    assert (await world.judge()).cause is None
    assert world.told == [KEY]


@pytest.mark.parametrize(
    "error", [Unreadable("HTTP 404"), Unreachable("no answer"), RuntimeError("a bug")]
)
async def test_a_hub_that_does_not_tell_stops_nothing(world: World, error: Exception) -> None:
    world.hub.answer = error
    verdict = await world.judge()
    assert verdict.cause is None
    assert verdict.fields is not None
    assert verdict.fields["result"] == "Unchecked"


async def test_a_hub_that_is_not_there_is_not_asked_for_each_model(world: World) -> None:
    world.hub.answer = Unreachable("no answer")
    for number in range(20):
        await world.judge(serving(model={"uri": f"hf://org/model-{number}"}))
    assert len(world.hub.asked) == 1
    world.now += UNREACHABLE_SECONDS + 1
    world.hub.answer = LLAMA_8B
    verdict = await world.judge(serving(model={"uri": "hf://org/new"}))
    assert verdict.fields is not None
    assert verdict.fields["result"] == "Passed"


async def test_what_was_read_holds_while_the_hub_is_away(world: World) -> None:
    service = serving(engine={"maxModelLen": 100_000})
    await world.judge(service)
    world.now += FRESH_SECONDS + 1
    world.hub.answer = Unreachable("no answer")
    verdict = await world.judge(service)
    assert verdict.cause is not None
    assert verdict.cause.reason == "DoesNotFit"


@pytest.mark.parametrize(
    ("value", "is_asked"),
    [(ENDPOINT, True), (f"{ENDPOINT}/", True), ("http://169.254.169.254", False), (None, False)],
)
async def test_no_service_chooses_whom_the_operator_asks(
    world: World, value: str | None, is_asked: bool
) -> None:
    variable = {"name": "HF_ENDPOINT", **({"value": value} if value else {"valueFrom": {}})}
    verdict = await world.judge(serving(podTemplate={"env": [variable]}))
    assert bool(world.hub.asked) == is_asked
    assert verdict.cause is None
    assert verdict.fields is not None
    assert (verdict.fields["result"] == "Unchecked") != is_asked


@pytest.mark.parametrize("scheme", ["pvc", "https", "s3", "oci"])
async def test_a_model_that_the_operator_does_not_read_stops_nothing_and_is_told(
    world: World, scheme: str
) -> None:
    verdict = await world.judge(serving(model={"uri": f"{scheme}://host/model"}))
    assert (verdict.cause, world.hub.asked) == (None, [])
    assert verdict.fields is not None
    (warning,) = verdict.fields["warnings"]
    assert f"does not read models of {scheme}://" in warning
    assert ("inspectionJobs" in warning) == (scheme in ("pvc", "https"))


async def test_names_alone_do_not_fill_the_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MODELS", 3)
    make: Callable[[int], Any] = lambda number: serving(model={"uri": f"hf://org/{number}"})  # noqa: E731
    for number in range(10):
        await world.judge(make(number))
    assert len(world.checks._models) == 3
    await world.checks.close()


async def test_a_reading_that_is_cut_off_ends(world: World) -> None:
    world.checks.judge(serving())
    await world.checks.close()
    assert world.told == []
