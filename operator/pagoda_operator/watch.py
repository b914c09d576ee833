"""kopf as the watcher: it says what an object of a service is now, and that something happened.

The only module that imports kopf. Every handler is `on.event`, which neither stores state in the
objects nor adds finalizers; a handler notes the object and puts a key into the queue. kopf reports
listed objects too (with the type None), but never a deletion that fell into a gap between two
watches: `resync` finds those.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Iterable, Iterator
from json import JSONDecodeError
from typing import Any

import kopf

# Not told in public, and raised at whoever runs kopf.
from kopf._cogs.clients.errors import APIError
from kopf._cogs.clients.watching import WatchingError

from pagoda_operator.cluster import StartError
from pagoda_operator.names import KIND, RESOURCES, WATCHED_KINDS
from pagoda_operator.queue import WorkQueue, backoff_seconds
from pagoda_operator.recall import Recall
from pagoda_operator.resync import Resync, selector_of
from pagoda_operator.status import is_seen

KINDS = {RESOURCES[kind][2]: kind for kind in WATCHED_KINDS}
_BAD_ANSWERS = (APIError, WatchingError, JSONDecodeError)
"""Of the API server, or of a proxy before it, to kopf, which gives up."""
OUTAGE_PAUSE_MAX_SECONDS = 10.0
SILENCE_SECONDS = 70.0
# One change of a Deployment is a burst of events of its pods; one pass answers them all.
BURST_SECONDS = 0.4


class EndlessBackoff:
    """Pauses between attempts to reach the API server: an outage must not end the operator."""

    def __iter__(self) -> Iterator[float]:
        for attempt in itertools.count(1):
            yield backoff_seconds(attempt, random.random(), 1.0, OUTAGE_PAUSE_MAX_SECONDS)


class NoDifferences(kopf.DiffBaseStorage):
    """What an object was before is asked by no handler; kopf would copy every object for it."""

    def build(
        self, *, body: kopf.Body, extra_fields: Iterable[kopf.FieldSpec] | None = None
    ) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is kept."""


async def watch(
    resync: Resync,
    queue: WorkQueue,
    recall: Recall,
    *,
    namespace: str | None,
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    """Watch services and their children until `stop` is set, a signal comes or a watch dies.

    Raises:
        StartError: the API server refused a watch, or what it says is not to be read.
    """
    try:
        await kopf.operator(
            registry=build_registry(resync, queue, recall),
            settings=build_settings(),
            standalone=True,
            # Found out from the user's name otherwise, which the user of a container may not have.
            identity="pagoda",  # type: ignore[arg-type]  # its type is a private NewType of str
            clusterwide=namespace is None,
            namespaces=() if namespace is None else (namespace,),
            stop_flag=stop,
            ready_flag=ready,
        )
    except _BAD_ANSWERS as error:
        raise StartError(f"a watch ended: {error}") from error


def without_traces(record: logging.LogRecord) -> bool:
    """A filter of logs: traces of what is no bug of ours and hurts nobody are not told."""
    if record.exc_info and isinstance(record.exc_info[1], _BAD_ANSWERS):
        record.exc_info = None
    message = record.getMessage()
    # kopf looks for a task in a callback, where there is none, when it ends a watch that begins.
    is_of_a_watch = "request_cancel_callback" in message
    # It leaves a watch open that is cancelled between two events; the loop's end closes its parts
    # in any order, of which they tell.
    is_of_a_watch |= "closing of asynchronous generator" in message and "infinite_watch" in message
    return not is_of_a_watch


def build_registry(resync: Resync, queue: WorkQueue, recall: Recall) -> kopf.OperatorRegistry:
    """The handlers; each one enqueues the LLMService that an object is or belongs to."""
    registry = kopf.OperatorRegistry()
    # A registry of one's own has no way to log in.
    kopf.on.login(registry=registry)(kopf.login_with_service_account)
    kopf.on.login(registry=registry)(kopf.login_with_kubeconfig)

    async def changed(
        *, event: kopf.RawEvent, resource: kopf.Resource, body: kopf.Body, **_: Any
    ) -> None:
        kind = KINDS[resource.plural]
        # A child, or only the status changed, most likely by ourselves: nobody waits for an answer.
        seen, wanted = body.status.get("observedGeneration"), body.metadata.get("generation")
        is_gone = event["type"] == "DELETED"
        for key in resync.note(kind, body.metadata, is_gone=is_gone):
            if event["type"] is None:
                # A list, in place of what happened since the last watch. It may be behind what
                # was read since it was asked for.
                recall.forget(key)
            else:
                recall.note(key, dict(event["object"]), is_gone=is_gone)
            if kind != KIND or seen == wanted:
                queue.add(key, BURST_SECONDS)
            elif not is_seen(dict(body.status)):
                # Many new services are sooner seen if each is made and told of in its turn.
                queue.add(key)
            else:
                queue.add_urgent(key)

    for kind in WATCHED_KINDS:
        kopf.on.event(*RESOURCES[kind], registry=registry)(changed)
    return registry


def build_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = NoDifferences()
    # kopf's events say what handlers did, which is of no use to the user of a service.
    settings.posting.enabled = False
    # Without it, kopf watches all CRDs and namespaces and needs the rights to.
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = EndlessBackoff()
    # A watch that stands still is renewed: bookmarks are a sign of life each minute.
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    for kind in WATCHED_KINDS:
        if selector := selector_of(kind):
            # A tuple: the dotted form of the key matches nothing, without a word.
            settings.watching.label_selectors[RESOURCES[kind]] = selector
    # Less than the grace period of the operator's pod.
    settings.process.ultimate_exiting_timeout = 25
    return settings
