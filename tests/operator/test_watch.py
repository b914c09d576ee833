"""kopf's side: settings that are easy to get wrong, and which key an object leads to."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator

import kopf
import pytest
from kopf._cogs.clients.watching import infinite_watch

from pagoda_operator.names import KIND, RESOURCES, WATCHED_KINDS
from pagoda_operator.watch import EndlessBackoff, build_settings, without_traces


def test_the_label_selector_applies_to_every_kind_of_child() -> None:
    settings = build_settings()
    for kind in WATCHED_KINDS:
        group, version, plural = RESOURCES[kind]
        resource = kopf.Resource(group=group, version=version, plural=plural)
        found = list(settings.watching.label_selectors.collect(resource))
        # Pods by what a pass lists them by: others may take the other label from them.
        expected = {KIND: [], "Pod": ["pagoda.dev/service"]}
        assert found == expected.get(kind, ["app.kubernetes.io/managed-by=pagoda"])


def test_kopf_writes_nothing_of_its_own() -> None:
    settings = build_settings()
    assert settings.posting.enabled is False
    assert settings.scanning.disabled is True


def test_the_backoff_never_ends_and_never_exceeds_ten_seconds() -> None:
    pauses = list(itertools.islice(EndlessBackoff(), 100))
    assert 0.5 <= pauses[0] <= 1.0
    assert all(5.0 <= pause <= 10.0 for pause in pauses[10:])


def test_a_watch_without_a_bookmark_for_a_minute_is_renewed() -> None:
    """Later than API servers send them, and before they forget what came meanwhile, after 75 s."""
    assert 60 < build_settings().watching.inactivity_timeout < 75


def test_an_answer_that_kopf_cannot_read_is_told_without_a_trace_and_a_bug_with_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.addFilter(without_traces)
    for error in (json.JSONDecodeError("cut off", "{", 1), RuntimeError("ours")):
        try:
            raise error
        except Exception:
            logging.getLogger("kopf").exception("Resource observer has failed")
    assert [record.exc_info is None for record in caplog.records] == [True, False]
    logging.getLogger("asyncio").error("Exception in callback request_cancel_callback()")
    assert len(caplog.records) == 2


async def test_the_end_of_the_loop_tells_nothing_of_watches_that_kopf_left_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.addFilter(without_traces)

    async def ours() -> AsyncIterator[None]:
        yield

    kopfs = infinite_watch(settings=build_settings(), resource=None, namespace=None)  # type: ignore[arg-type]
    for generator in (kopfs, ours()):
        # As `loop.shutdown_asyncgens` does.
        message = f"an error occurred during closing of asynchronous generator {generator!r}"
        context = {"message": message, "exception": RuntimeError(), "asyncgen": generator}
        asyncio.get_running_loop().call_exception_handler(context)
    assert ["ours" in record.message for record in caplog.records] == [True]
