"""kopf as the watcher: it says that something happened to a service, and nothing more.

The only module that imports kopf. Every handler is `on.event`, which neither stores state in the
objects nor adds finalizers; a handler only puts a key into the queue. kopf reports listed objects
too (with the type None), but never a deletion that fell into a gap between two watches: the resync
of `main` finds those.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import kopf

from pagoda_operator.names import (
    CHILD_KINDS,
    KIND,
    LABEL_MANAGED_BY,
    LABEL_SERVICE,
    MANAGED_BY,
    RESOURCES,
    Key,
)
from pagoda_operator.queue import backoff_seconds

CHILDREN = tuple(RESOURCES[kind] for kind in (*CHILD_KINDS, "Pod"))
OUTAGE_PAUSE_MAX_SECONDS = 10.0
# One change of a Deployment is a burst of events of its pods; one pass answers them all.
BURST_SECONDS = 0.4


class EndlessBackoff:
    """Pauses between attempts to reach the API server: an outage must not end the operator."""

    def __iter__(self) -> Iterator[float]:
        for attempt in itertools.count(1):
            yield backoff_seconds(attempt, random.random(), 1.0, OUTAGE_PAUSE_MAX_SECONDS)


async def watch(
    enqueue: Callable[[Key, float], None],
    *,
    namespace: str | None,
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    """Watch services and their children until `stop` is set, a signal comes or a watch dies."""
    await kopf.operator(
        registry=build_registry(enqueue),
        settings=build_settings(),
        standalone=True,
        # Found out from the user's name otherwise, which the user of a container may not have.
        identity="pagoda",  # type: ignore[arg-type]  # its type is a private NewType of str
        clusterwide=namespace is None,
        namespaces=() if namespace is None else (namespace,),
        stop_flag=stop,
        ready_flag=ready,
    )


def build_registry(enqueue: Callable[[Key, float], None]) -> kopf.OperatorRegistry:
    """The handlers; each one enqueues the LLMService that an object is or belongs to."""
    registry = kopf.OperatorRegistry()
    # A registry of one's own has no way to log in.
    kopf.on.login(registry=registry)(kopf.login_with_service_account)
    kopf.on.login(registry=registry)(kopf.login_with_kubeconfig)

    @kopf.on.event(*RESOURCES[KIND], registry=registry)
    async def service_changed(
        *, namespace: str | None, name: str, body: kopf.Body, **_: Any
    ) -> None:
        # A namespaced kind always has a namespace; kopf's types allow cluster-wide kinds.
        if namespace is not None:
            # Only the status changed, most likely by ourselves: nobody waits for an answer.
            is_known = body.status.get("observedGeneration") == body.metadata.get("generation")
            enqueue(Key(namespace, name), BURST_SECONDS if is_known else 0.0)

    async def child_changed(*, namespace: str | None, body: kopf.Body, **_: Any) -> None:
        if namespace is not None:
            for name in owners(body):
                enqueue(Key(namespace, name), BURST_SECONDS)

    for resource in CHILDREN:
        kopf.on.event(*resource, registry=registry)(child_changed)
    return registry


def owners(manifest: Mapping[str, Any]) -> set[str]:
    """The LLMServices that an object belongs to, or should: by its owner and by its label.

    They differ if somebody edited one of them. A pod's owner is a ReplicaSet; it has the label.
    """
    metadata = manifest["metadata"]
    names = {
        owner["name"] for owner in metadata.get("ownerReferences", []) if owner["kind"] == KIND
    }
    if label := metadata.get("labels", {}).get(LABEL_SERVICE):
        names.add(label)
    return names


def build_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # kopf's events say what handlers did, which is of no use to the user of a service.
    settings.posting.enabled = False
    # Without it, kopf watches all CRDs and namespaces and needs the rights to.
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = EndlessBackoff()
    # A watch that is renewed now and then cannot stay silently dead.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    for resource in CHILDREN:
        # A tuple: the dotted form of the key matches nothing, without a word.
        settings.watching.label_selectors[resource] = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
    # Less than the grace period of the operator's pod.
    settings.process.ultimate_exiting_timeout = 25
    return settings
