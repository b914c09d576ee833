"""What was read once is not read again before a watch tells of another version."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pagoda_operator import recall as module
from pagoda_operator.cluster import ApiError, Conflict, NotFound, Refused, Unavailable
from pagoda_operator.containers import CRASHES_UNTIL_STALLED
from pagoda_operator.execute import delete_failed
from pagoda_operator.names import KIND, LABEL_SERVICE, ChildRef, Manifest
from pagoda_operator.recall import Recall
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.testing import KEY, MemoryCluster, make_manifest, make_pod, make_poller

REF = ChildRef("Service", "chat")


class Watched(MemoryCluster):
    """Tells of versions as watches do, and counts what is read by name."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.is_told = True
        self.while_listing: Callable[[], None] | None = None
        self.now = 0.0

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        self.reads[kind] += 1
        return await super().get(kind, namespace, name)

    async def list(
        self, kind: str, namespace: str | None, selector: str = "", fields: str = ""
    ) -> list[Manifest]:
        self.reads[f"{kind}s"] += 1
        found = copy.deepcopy(await super().list(kind, namespace, selector, fields))
        if self.while_listing is not None:
            self.while_listing()
        return found

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


async def test_what_a_watch_tells_is_not_read(watched: Watched, recall: Recall) -> None:
    stored = watched.put_service(1)
    recall.note(KEY, stored, is_gone=False)
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 1}
    stored["metadata"]["resourceVersion"], stored["spec"] = "77", {"port": 2}
    recall.note(KEY, stored, is_gone=False)
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 2}
    assert not watched.reads


async def test_what_was_written_is_newer_than_what_a_watch_tells_later(
    watched: Watched, recall: Recall
) -> None:
    before = copy.deepcopy(watched.put_service(1))
    written = copy.deepcopy(before)
    written["metadata"]["resourceVersion"], written["spec"] = "77", {"port": 2}
    recall.keep(KEY, written)
    recall.note(KEY, before, is_gone=False)
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 2}
    assert not watched.reads


@pytest.mark.parametrize("how", ["forget", "clear"])
async def test_what_was_known_before_it_was_forgotten_is_not_told_as_news_later(
    watched: Watched, recall: Recall, how: str
) -> None:
    stored = watched.put_service(1)
    before = copy.deepcopy(stored)
    stored["metadata"]["resourceVersion"], stored["spec"] = "77", {"port": 2}
    await recall.get(KEY, REF)
    recall.forget(KEY) if how == "forget" else recall.clear()
    recall.note(KEY, before, is_gone=False)
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 2}
    assert watched.reads == {"Service": 2}
    recall.forget(KEY)
    recall.note(KEY, stored, is_gone=False)
    assert (await recall.get(KEY, REF) or {})["spec"] == {"port": 2}
    assert watched.reads == {"Service": 2}


async def test_versions_that_are_no_numbers_only_differ(watched: Watched, recall: Recall) -> None:
    stored = watched.put_service(1)
    stored["metadata"]["resourceVersion"] = "b"
    recall.note(KEY, stored, is_gone=False)
    await recall.get(KEY, REF)
    stored["metadata"]["resourceVersion"] = "a"
    await recall.get(KEY, REF)
    assert watched.reads == {"Service": 1}


async def test_only_the_object_that_went_is_dropped(watched: Watched, recall: Recall) -> None:
    first = copy.deepcopy(watched.put_service(1))
    second = copy.deepcopy(watched.put_service(2))
    recall.note(KEY, second, is_gone=False)
    # Watches tell of objects each in its own time.
    recall.note(KEY, first, is_gone=True)
    await recall.get(KEY, REF)
    assert not watched.reads
    recall.note(KEY, second, is_gone=True)
    await recall.get(KEY, REF)
    assert watched.reads == {"Service": 1}


async def test_what_is_gone_is_not_remembered(watched: Watched, recall: Recall) -> None:
    watched.put_service(1)
    await recall.get(KEY, REF)
    watched.objects.clear()
    assert await recall.get(KEY, REF) is None
    assert await recall.get(KEY, REF) is None


async def test_passes_without_news_read_no_object_by_name(watched: Watched, recall: Recall) -> None:
    reconciler = await settled(watched, recall)
    await reconciler.reconcile(KEY)
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


@pytest.fixture
async def listed(watched: Watched, recall: Recall) -> list[Manifest]:
    """Two pods that were listed."""
    pods = [watched.put(make_pod("1", name=f"chat-{name}")) for name in "ab"]
    assert names(await recall.list_pods(KEY)) == ["chat-a", "chat-b"]
    watched.reads.clear()
    return pods


def names(pods: list[Manifest]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods]


async def test_pods_are_listed_once_and_followed(
    watched: Watched, recall: Recall, listed: list[Manifest]
) -> None:
    recall.note(KEY, watched.put(make_pod("1", name="chat-0")), is_gone=False)
    listed[0]["metadata"]["resourceVersion"], listed[0]["status"] = "77", {"phase": "Failed"}
    recall.note(KEY, listed[0], is_gone=False)
    recall.note(KEY, listed[1], is_gone=True)
    pods = await recall.list_pods(KEY)
    assert names(pods) == ["chat-0", "chat-a"]
    assert pods[1]["status"] == {"phase": "Failed"}
    assert not watched.reads


@pytest.mark.parametrize("why", ["changed", "untold", "old", "forgotten"])
async def test_pods_are_listed_again_when(
    watched: Watched, recall: Recall, listed: list[Manifest], why: str
) -> None:
    changes: dict[str, Callable[[], None]] = {
        "changed": lambda: listed[0]["metadata"].update(resourceVersion="77"),
        "untold": lambda: setattr(watched, "is_told", False),
        "old": lambda: setattr(watched, "now", module.TRUSTED_SECONDS),
        "forgotten": lambda: recall.forget(KEY),
    }
    changes[why]()
    await recall.list_pods(KEY)
    assert watched.reads == {"Pods": 1}


async def test_pods_that_a_watch_told_of_before_are_listed_all_the_same(
    watched: Watched, recall: Recall
) -> None:
    watched.put(make_pod("1", name="chat-a"))
    recall.note(KEY, watched.put(make_pod("1", name="chat-b")), is_gone=False)
    assert names(await recall.list_pods(KEY)) == ["chat-a", "chat-b"]


async def test_a_list_is_behind_what_a_watch_told_while_it_was_on_its_way(
    watched: Watched, recall: Recall, listed: list[Manifest]
) -> None:
    watched.now = module.TRUSTED_SECONDS
    came = make_pod("1", name="chat-c")
    watched.while_listing = lambda: recall.note(KEY, watched.put(came), is_gone=False)
    await recall.list_pods(KEY)
    watched.while_listing = None
    assert names(await recall.list_pods(KEY)) == ["chat-a", "chat-b", "chat-c"]
    assert watched.reads == {"Pods": 1}


async def test_a_list_that_was_on_its_way_when_all_was_forgotten_is_not_remembered(
    watched: Watched, recall: Recall, listed: list[Manifest]
) -> None:
    watched.now = module.TRUSTED_SECONDS
    watched.while_listing = lambda: recall.forget(KEY)
    await recall.list_pods(KEY)
    await recall.list_pods(KEY)
    assert watched.reads == {"Pods": 2}


async def test_pods_that_a_list_has_no_more_are_gone(
    watched: Watched, recall: Recall, listed: list[Manifest]
) -> None:
    watched.now = module.TRUSTED_SECONDS
    del watched.objects["Pod", "chat-a"]
    assert names(await recall.list_pods(KEY)) == ["chat-b"]
    assert names(await recall.list_pods(KEY)) == ["chat-b"]
    assert watched.reads == {"Pods": 1}


async def test_a_pod_is_the_services_that_its_label_names(
    watched: Watched, recall: Recall, listed: list[Manifest]
) -> None:
    other = make_pod("1", name="chat-c")
    other["metadata"]["labels"][LABEL_SERVICE] = "another"
    recall.note(KEY, watched.put(other), is_gone=False)
    assert names(await recall.list_pods(KEY)) == ["chat-a", "chat-b"]


async def test_failed_pods_are_deleted_once(
    watched: Watched, recall: Recall, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        pod = watched.put(make_pod("1", name=f"chat-{number}"))
        pod["metadata"]["creationTimestamp"] = f"2026-11-2{number}T00:00:00Z"
        pod["status"] = {"phase": "Failed", "reason": "Evicted"}
    deleted: list[str] = []

    async def delete(live: Manifest) -> None:
        deleted.append(live["metadata"]["name"])

    monkeypatch.setattr(watched, "delete", delete)
    for _ in range(2):
        await delete_failed(recall, KEY, await recall.list_pods(KEY))
    assert len(deleted) == len(set(deleted)) == 9 - CRASHES_UNTIL_STALLED


async def test_a_service_that_is_gone_untold_is_read_again(
    watched: Watched, recall: Recall, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = watched.put(make_manifest())
    recall.note(KEY, stored, is_gone=False)
    reconciler = Reconciler(watched, make_poller(), engine_image="engine:1", recall=recall)
    with monkeypatch.context() as patch:
        patch.setattr(watched, "apply_status", fail_with(NotFound("gone")))
        for _ in range(2):
            await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)
    assert watched.reads[KIND] == 1
