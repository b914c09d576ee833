"""What was read once is not read again before a watch tells of another version."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pagoda_operator import recall as module
from pagoda_operator.cluster import ApiError, Conflict, Refused, Unavailable
from pagoda_operator.names import KIND, ChildRef, Manifest
from pagoda_operator.recall import Recall
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.testing import KEY, MemoryCluster, make_manifest, make_poller

REF = ChildRef("Service", "chat")


class Watched(MemoryCluster):
    """Tells of versions as watches do, and counts what is read by name."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.is_told = True
        self.now = 0.0

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        self.reads[kind] += 1
        return await super().get(kind, namespace, name)

    def version(self, kind: str, uid: str) -> str | None:
        found = [it for it in self.objects.values() if it["metadata"]["uid"] == uid]
        return found[0]["metadata"]["resourceVersion"] if found and self.is_told else None

    def put_service(self, port: int) -> Manifest:
        metadata = {"name": REF.name, "namespace": KEY.namespace}
        return self.put({"kind": "Service", "metadata": metadata, "spec": {"port": port}})


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def recall(watched: Watched) -> Recall:
    return Recall(watched, watched.version, lambda: watched.now)


async def settled(watched: Watched, recall: Recall) -> Reconciler:
    """Its first passes made a service's children and wrote the status."""
    watched.put(make_manifest())
    reconciler = Reconciler(watched, make_poller(), engine_image="engine:1", recall=recall)
    await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)
    return reconciler


async def test_it_is_read_once_and_each_reader_has_a_copy(watched: Watched, recall: Recall) -> None:
    watched.put_service(1)
    first = await recall.get(KEY, REF)
    assert first is not None
    first["spec"]["port"] = 9
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 1}
    assert watched.reads == {"Service": 1}


@pytest.mark.parametrize(
    "why", ["changed", "made anew", "untold", "old", "dropped", "forgotten", "cleared"]
)
async def test_it_is_read_again_when(watched: Watched, recall: Recall, why: str) -> None:
    stored = watched.put_service(1)
    await recall.get(KEY, REF)
    changes: dict[str, Any] = {
        "changed": lambda: stored["metadata"].update(resourceVersion="77"),
        "made anew": lambda: watched.put_service(1),
        "untold": lambda: setattr(watched, "is_told", False),
        "old": lambda: setattr(watched, "now", module.TRUSTED_SECONDS),
        "dropped": lambda: recall.drop(KEY, REF),
        "forgotten": lambda: recall.forget(KEY),
        "cleared": recall.clear,
    }
    changes[why]()
    await recall.get(KEY, REF)
    assert watched.reads == {"Service": 2}


async def test_what_is_gone_is_not_remembered(watched: Watched, recall: Recall) -> None:
    watched.put_service(1)
    await recall.get(KEY, REF)
    watched.objects.clear()
    assert await recall.get(KEY, REF) is None
    assert await recall.get(KEY, REF) is None


async def test_passes_without_news_read_no_object_by_name(watched: Watched, recall: Recall) -> None:
    reconciler = await settled(watched, recall)
    watched.reads.clear()
    await reconciler.reconcile(KEY)
    assert not watched.reads
    watched.find("Deployment", "chat-engine")["metadata"]["resourceVersion"] = "77"
    await reconciler.reconcile(KEY)
    assert watched.reads == {"Deployment": 1}


async def test_an_edit_that_a_watch_tells_of_is_undone(watched: Watched, recall: Recall) -> None:
    reconciler = await settled(watched, recall)
    service = watched.find("Service", "chat")
    service["metadata"]["resourceVersion"] = "77"
    wanted, service["spec"]["ports"] = service["spec"]["ports"], []
    await reconciler.reconcile(KEY)
    assert watched.find("Service", "chat")["spec"]["ports"] == wanted


async def test_the_status_of_a_new_generation_is_that_of_its_spec(
    watched: Watched, recall: Recall
) -> None:
    reconciler = await settled(watched, recall)
    watched.edit({"replicas": 3}, generation=2)
    await reconciler.reconcile(KEY)
    assert watched.find(KIND, "chat")["status"]["observedGeneration"] == 2
    assert watched.find("Deployment", "chat-engine")["spec"]["replicas"] == 3


@pytest.mark.parametrize("error", [Conflict("not it"), Unavailable("gone"), Refused("no")])
async def test_after_a_failure_everything_is_read_again(
    watched: Watched, recall: Recall, monkeypatch: pytest.MonkeyPatch, error: ApiError
) -> None:
    reconciler = await settled(watched, recall)
    watched.edit({"engine": {"maxNumSeqs": 7}}, generation=2)
    # The next write fails, and no watch tells of what happened meanwhile.
    with monkeypatch.context() as patch:
        patch.setattr(watched, "apply", fail_with(error))
        with contextlib.suppress(ApiError):
            await reconciler.reconcile(KEY)
    watched.reads.clear()
    await reconciler.reconcile(KEY)
    assert {"ServiceAccount", "Service", "Deployment"} <= set(watched.reads)


def fail_with(error: ApiError) -> Callable[..., Awaitable[None]]:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


async def test_an_object_of_others_that_took_the_name_is_not_written(
    watched: Watched, recall: Recall
) -> None:
    reconciler = await settled(watched, recall)
    uid = watched.find("Deployment", "chat-engine")["metadata"]["uid"]
    watched.edit({"engine": {"maxNumSeqs": 7}}, generation=2)
    sent: list[Manifest] = []
    apply = watched.apply

    async def note(manifest: Manifest, *, manager: str, force: bool) -> Manifest:
        sent.append(manifest)
        return await apply(manifest, manager=manager, force=force)

    watched.apply = note  # type: ignore[method-assign]
    await reconciler.reconcile(KEY)
    assert [it["metadata"].get("uid") for it in sent] == [uid]
