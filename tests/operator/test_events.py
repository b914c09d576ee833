"""Events that are told, and events that are heard."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pagoda_operator.cause import Cause
from pagoda_operator.cluster import Unavailable
from pagoda_operator.events import render_events, service_of
from pagoda_operator.names import Key, Manifest
from pagoda_operator.observe import watch_warnings
from pagoda_operator.status import Counts, failed_status, stamp
from pagoda_operator.testing import make_manifest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LOADING = Cause("LoadingModel", "it loads", False)
STALL = Cause("ModelNotFound", "the folder ‘x’ is not there", True)


def status_of(cause: Cause) -> Manifest:
    return stamp(*failed_status(cause, Counts.of(None), {}), {}, 1, NOW)


def tell(before: Manifest, after: Manifest, version: str = "7") -> list[Manifest]:
    service = make_manifest() | {"status": before}
    service["metadata"]["resourceVersion"] = version
    return list(render_events(service, after, NOW, instance="operator-1"))


def test_a_transition_is_told_once_however_often_the_pass_is_repeated() -> None:
    (first,) = tell(status_of(LOADING), status_of(STALL))
    (again,) = tell(status_of(LOADING), status_of(STALL))
    (later,) = tell(status_of(LOADING), status_of(STALL), version="9")
    assert (first["type"], first["reason"], first["note"]) == (
        "Warning",
        "ModelNotFound",
        STALL.message,
    )
    assert first["metadata"]["name"] == again["metadata"]["name"] != later["metadata"]["name"]
    assert first["regarding"]["uid"] == make_manifest()["metadata"]["uid"]
    assert tell(status_of(STALL), status_of(STALL)) == []


def test_work_that_goes_on_is_normal_and_its_beginning_no_news() -> None:
    (told,) = tell({"observedGeneration": -1}, status_of(LOADING))
    assert told["type"] == "Normal"
    assert tell({}, status_of(Cause("Progressing", "it begins", False))) == []


def test_a_note_is_as_long_as_the_api_takes_it() -> None:
    long = Cause("ModelNotFound", "‘" * 900, True)
    (told,) = tell({}, status_of(long))
    assert 1020 < len(told["note"].encode()) <= 1024


@pytest.mark.parametrize(
    ("pod", "reason", "key"),
    [
        ("chat-engine-7f9c4b-x2x4z", "FailedMount", Key("team", "chat")),
        ("my-engine-a-load-0123abc-x2x4z", "FailedMount", Key("team", "my-engine-a")),
        ("chat-engine-7f9c4b-x2x4z", "Unhealthy", None),
        ("postgres-0", "FailedMount", None),
    ],
)
def test_a_warning_is_about_the_service_that_its_pod_is_named_after(
    pod: str, reason: str, key: Key | None
) -> None:
    about = {"kind": "Pod", "namespace": "team", "name": pod}
    assert service_of({"reason": reason, "involvedObject": about}) == key


async def test_warnings_are_heard_again_after_a_watch_that_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pagoda_operator.observe.backoff_seconds", lambda *_: 0.0)
    asked, heard = [], []
    about = {"kind": "Pod", "namespace": "team", "name": "chat-engine-7f9c4b-x2x4z"}

    class Api:
        async def watch(self, *_: Any, since: str, seconds: float) -> Any:
            asked.append(since)
            metadata = {"resourceVersion": str(len(asked))}
            yield {"metadata": metadata, "reason": "FailedMount", "involvedObject": about}
            if len(asked) == 2:
                raise Unavailable("the resourceVersion is too old")

    def enqueue(key: Key) -> None:
        heard.append(key)
        if len(heard) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await watch_warnings(Api(), None, enqueue)  # type: ignore[arg-type]
    assert asked == ["", "1", "", "3"]
    assert heard == [Key("team", "chat")] * 4
