"""The operator's flags, and the task that lists all services."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from pagoda_operator import main
from pagoda_operator.cluster import ApiServer, StartError
from pagoda_operator.main import Operator, Options, parse_options
from pagoda_operator.names import OPTIONAL_KINDS
from pagoda_operator.telemetry import Telemetry

OPTIONS = Options(
    namespace=None,
    engine_image="e:1",
    hub_endpoint="",
    inspection_image="",
    replica_of="",
    log_level="info",
    health_port=0,
)


@pytest.mark.parametrize("flags", [[], ["--namespace="], ["--namespace", ""]])
def test_no_namespace_and_an_empty_one_are_all_of_them(flags: list[str]) -> None:
    assert parse_options(["--engine-image", "engine:1", *flags]).namespace is None


def test_a_namespace_is_the_one_that_is_served() -> None:
    assert parse_options(["--engine-image=engine:1", "--namespace=team"]).namespace == "team"


class Listing:
    """An API server whose first list is none, as the page of a proxy may be."""

    def __init__(self) -> None:
        self.lists: list[Any] = [TypeError("no items"), []]

    async def served_kinds(self, kinds: Collection[str]) -> frozenset[str]:
        return frozenset(kinds)

    async def list_metadata(self, kind: str, namespace: str | None, selector: str) -> list[Any]:
        found = self.lists.pop(0)
        if isinstance(found, Exception):
            raise found
        return list(found)


async def test_an_answer_that_is_no_list_does_not_end_the_resync(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "backoff_seconds", lambda failures, jitter: 0.0)
    api: Any = Listing()
    operator = Operator(OPTIONS, api, Telemetry())
    resync = asyncio.create_task(operator._resync_forever())
    while api.lists:
        await asyncio.sleep(0.001)
    assert operator._find_hindrance() != "the LLMServices are not listed yet"
    assert not resync.done()
    resync.cancel()


class Discovery(ApiServer):
    """An API server that serves these versions of groups."""

    def __init__(self, *served: str) -> None:
        super().__init__(client=None, telemetry=Telemetry())
        versions = [{"groupVersion": it, "version": it.split("/")[1]} for it in served]
        self._groups = [{"name": it["groupVersion"], "versions": [it]} for it in versions]

    async def _request(self, method: str, path: str, **_: Any) -> dict[str, Any]:
        assert method == "GET"
        if path == "/apis":
            return {"groups": self._groups}
        assert path.removeprefix("/apis/") in {it["name"] for it in self._groups}
        return {"resources": [{"name": "llmservices"}, {"name": "podmonitors"}]}


async def test_of_kinds_that_a_cluster_may_lack_those_with_a_crd_are_known() -> None:
    api = Discovery("apps/v1", "monitoring.coreos.com/v1")
    assert await api.served_kinds(OPTIONAL_KINDS) == {"PodMonitor"}
    assert await Discovery("apps/v1").served_kinds(OPTIONAL_KINDS) == frozenset()


async def test_an_operator_without_the_crd_ends_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "CRD_WAIT_SECONDS", -1.0)
    await Operator(
        OPTIONS, Discovery("apps/v1", "pagoda.dev/v1alpha1"), Telemetry()
    )._wait_for_crd()
    with pytest.raises(StartError, match=r"llmservices\.pagoda\.dev .* is not installed"):
        await Operator(OPTIONS, Discovery("pagoda.dev/v1"), Telemetry())._wait_for_crd()
