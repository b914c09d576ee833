"""The command `pagoda-operator`: put the parts together, run, and end cleanly.

Order: credentials → the CRD is served → health server → the Lease → workers, resync → watches. On
SIGTERM the passes that are under way are finished, then the watches end. An API server that does
not answer never ends the operator; a missing CRD, a watch that died and a lost Lease do.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from pagoda_operator import tools
from pagoda_operator.checks import Checks
from pagoda_operator.cluster import ApiError, ApiServer, StartError, Unavailable, own_namespace
from pagoda_operator.health import serve_health
from pagoda_operator.hub import Hub
from pagoda_operator.inspections import Inspections
from pagoda_operator.lease import Lease
from pagoda_operator.names import KIND, OPTIONAL_KINDS, Key
from pagoda_operator.observe import watch_warnings
from pagoda_operator.poll import Poller
from pagoda_operator.queue import WorkQueue, backoff_seconds
from pagoda_operator.recall import Recall
from pagoda_operator.reconcile import Reconciler
from pagoda_operator.resync import Resync
from pagoda_operator.telemetry import Telemetry
from pagoda_operator.watch import BURST_SECONDS, watch, without_traces

logger = logging.getLogger(__name__)

QUEUE = "llmservice"
NUM_WORKERS = 8
RESYNC_SECONDS = 60.0
# A pass of every service once in so many looks of the resync, for what nobody thought of.
LOOKS_PER_ROUND = 60
FINISH_SECONDS = 10.0
CRD_WAIT_SECONDS = 30.0
# What another operator serves is looked at again.
FOREIGN_RETRY_SECONDS = 10.0
# What is known of services is long-lived and in no circles: to look for those after every 700 new
# objects, as Python does, is a fifth of what an idle operator takes.
OBJECTS_PER_COLLECTION = 50_000
# The API server did not answer for so long that another operator may have begun.
UNSURE_RETRY_SECONDS = 1.0


class Options(argparse.Namespace):
    namespace: str | None
    engine_image: str
    hub_endpoint: str
    inspection_image: str
    replica_of: str
    log_level: str
    health_port: int


class Operator:
    """The running parts of one operator."""

    def __init__(self, options: Options, api: ApiServer, telemetry: Telemetry) -> None:
        clock = asyncio.get_running_loop().time
        self._options = options
        self._api = api
        self._telemetry = telemetry
        self._queue = WorkQueue(clock, telemetry.queue_seconds.labels(name=QUEUE).observe)
        self._poller = Poller(clock=clock, on_change=self._queue.add, telemetry=telemetry)
        self._checks = _make_checks(options, api, clock, self._queue.add)
        self._resync = Resync(
            api,
            telemetry,
            self._queue.add,
            forget=lambda key: self._recall.forget(key),
            namespace=options.namespace,
            clock=clock,
        )
        self._recall = Recall(api, self._resync.told, clock)
        self._reconciler = Reconciler(
            api,
            self._poller,
            engine_image=options.engine_image,
            operator_namespace=own_namespace(),
            instance=socket.gethostname(),
            checks=self._checks,
            recall=self._recall,
        )
        self._clock = clock
        self._lease = Lease(
            api,
            options.namespace,
            clock,
            replica_of=options.replica_of,
            on_regained=self._recall.clear,
        )
        self._is_listed = False
        self._workers: list[asyncio.Task[None]] = []
        telemetry.queue_depth.labels(name=QUEUE).set_function(lambda: self._queue.num_due)
        is_leader = telemetry.is_leader.labels(name=self._lease.name)
        is_leader.set_function(lambda: float(self._lease.is_held))

    async def run(self) -> None:
        """Run until a signal comes or a watch dies."""
        options = self._options
        await self._wait_for_crd()
        probes = {"/livez": self._find_death, "/readyz": self._find_hindrance}
        health = await serve_health(options.health_port, probes, self._telemetry)
        await self._lease.acquire()
        loop = asyncio.get_running_loop()
        self._workers = [loop.create_task(self._work()) for _ in range(NUM_WORKERS)]
        resync = loop.create_task(self._resync_forever())
        warnings = loop.create_task(watch_warnings(self._api, options.namespace, self._add_soon))
        stop_watching, ready = asyncio.Event(), asyncio.Event()
        watching = loop.create_task(
            watch(
                self._resync,
                self._queue,
                self._recall,
                namespace=options.namespace,
                stop=stop_watching,
                ready=ready,
            )
        )
        signals = loop.create_task(_stop_on_signals(ready))
        renewal = loop.create_task(self._lease.renew())
        try:
            ends = {watching, signals, renewal, resync}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            logger.info("ending")
            # Ours first: kopf cancels the tasks that were made while it ran.
            self._queue.close()
            is_behind = resync.done()
            for task in (resync, warnings, signals):
                task.cancel()
            await asyncio.wait(self._workers, timeout=FINISH_SECONDS)
            await self._poller.close()
            if self._checks is not None:
                await self._checks.close()
            is_lost = renewal.done()
            renewal.cancel()
            await self._lease.release()
            stop_watching.set()
            await watching
            if is_lost:
                raise StartError(f"{self._lease.describe_holder()}.")
            if is_behind:
                await resync
        finally:
            await health.cleanup()

    def _find_hindrance(self) -> str | None:
        if not self._lease.is_held:
            return None if self._lease.is_reserve else self._lease.describe_holder()
        return None if self._is_listed else "the LLMServices are not listed yet"

    def _find_death(self) -> str | None:
        return "a worker ended" if any(worker.done() for worker in self._workers) else None

    def _add_soon(self, key: Key) -> None:
        self._queue.add(key, BURST_SECONDS)

    async def _wait_for_crd(self) -> None:
        """Return when the CRD is served; while the API server does not answer, wait for ever."""
        deadline = self._clock() + CRD_WAIT_SECONDS
        failures = 0
        while True:
            pause = 1.0
            try:
                if await self._api.served_kinds((KIND,)):
                    return
                failures = 0
            except Unavailable as error:
                failures += 1
                pause = max(backoff_seconds(failures, 1.0), error.retry_after_seconds)
                deadline = self._clock() + CRD_WAIT_SECONDS
                logger.warning("the API server does not answer: %s", error)
            if self._clock() > deadline:
                raise StartError(
                    "the CustomResourceDefinition llmservices.pagoda.dev (v1alpha1) is not "
                    "installed; the chart does that (crds.install), or "
                    "`kubectl apply --server-side -k crds`."
                )
            await asyncio.sleep(pause)

    async def _work(self) -> None:
        """Take keys and reconcile them, one after the other."""
        while (key := await self._queue.take()) is not None:
            with self._telemetry.reconcile_seconds.labels(controller=QUEUE).time():
                result = await self._reconcile(key)
            self._telemetry.reconciles.labels(controller=QUEUE, result=result).inc()

    async def _reconcile(self, key: Key) -> str:
        try:
            if not self._lease.is_held:
                self._queue.done(key, requeue_seconds=UNSURE_RETRY_SECONDS)
                return "retry"
            if await self._lease.other_holder(key.namespace) is not None:
                self._reconciler.forget(key)
                self._queue.done(key, requeue_seconds=FOREIGN_RETRY_SECONDS)
                return "foreign"
            requeue_seconds = await self._reconciler.reconcile(key)
        except ApiError as error:
            delay = self._failed(key, error.retry_after_seconds)
            logger.warning("%s: again in %.1f s: %s", key, delay, error)
            return "retry"
        except Exception:
            # Our bug: the other services go on, and this one is tried again.
            delay = self._failed(key)
            logger.exception("%s: again in %.1f s", key, delay)
            return "error"
        self._queue.done(key, requeue_seconds=requeue_seconds)
        return "success"

    def _failed(self, key: Key, at_least_seconds: float = 0.0) -> float:
        self._telemetry.retries.labels(name=QUEUE).inc()
        return self._queue.failed(key, at_least_seconds=at_least_seconds)

    async def _resync_forever(self) -> None:
        """Enqueue every service at the start, and then what no watch told of.

        Raises:
            StartError: a watch stands still; a new process has new ones.
        """
        failures = num_looks = 0
        while True:
            begun = self._clock()
            try:
                served = await self._api.served_kinds(OPTIONAL_KINDS)
                if self._is_listed:
                    keys = await self._resync.look(served)
                else:
                    # The watches have told nothing yet.
                    keys = await self._resync.list_services()
            except Exception as error:
                # Whatever comes in place of a list: without this task no missed event is healed.
                failures += 1
                logger.warning("cannot list LLMServices: %r", error)
                asked = getattr(error, "retry_after_seconds", 0.0)
                await asyncio.sleep(max(backoff_seconds(failures, 1.0), asked))
                continue
            failures = 0
            if kind := self._resync.find_dead():
                raise StartError(f"the watch of the kind {kind} stands still.")
            is_news = not self._is_listed or served != self._reconciler.served
            for key in keys if is_news else keys[num_looks % LOOKS_PER_ROUND :: LOOKS_PER_ROUND]:
                self._queue.add(key)
            self._reconciler.served, self._is_listed = served, True
            num_looks += 1
            # A look waits for what is on its way; the next one is not later for it.
            await asyncio.sleep(max(1.0, begun + RESYNC_SECONDS - self._clock()))


def _make_checks(
    options: Options,
    api: ApiServer,
    clock: Callable[[], float],
    on_change: Callable[[Key], None],
) -> Checks | None:
    """Preflight, as far as flags say how models may be read."""
    image, hub = options.inspection_image, None
    if options.hub_endpoint:
        hub = Hub(options.hub_endpoint)
    inspections = Inspections(api, image) if image else None
    if hub is None and inspections is None:
        return None
    return Checks(hub, clock, on_change, inspections)


async def _stop_on_signals(ready: asyncio.Event) -> None:
    """Return when SIGTERM or SIGINT came; until `ready`, kopf's own handlers are in force."""
    await ready.wait()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def parse_options(arguments: Sequence[str]) -> Options:
    """The flags as values; ends the process with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="pagoda-operator",
        description="Serve the LLMServices of a cluster. Commands for people: "
        f"{', '.join(f'pagoda-operator {name} --help' for name in tools.COMMANDS)}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--namespace",
        type=lambda text: text or None,
        help="the one namespace to serve (all of them if the flag is absent or empty)",
    )
    parser.add_argument(
        "--engine-image", required=True, help="image of engines whose LLMService names none"
    )
    parser.add_argument(
        "--hub-endpoint",
        default="",
        help="a Hugging Face hub, as https://huggingface.co, where hf:// models are looked up "
        "before a GPU is taken for them (they are not if the flag is absent or empty)",
    )
    parser.add_argument(
        "--inspection-image",
        default="",
        help="the operator's own image, for Jobs that read models on claims, of web servers, and "
        "of a hub with a token, before a GPU is taken for them (they are not read if the flag is "
        "absent or empty)",
    )
    parser.add_argument(
        "--replica-of",
        default="",
        help="the name of the installation, where several replicas stand by for each other: one "
        "that waits for another one of the name is ready",
    )
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error")
    )
    parser.add_argument(
        "--health-port", type=int, default=8080, help="of /livez, /readyz and /metrics (8080)"
    )
    return parser.parse_args(arguments, Options())


async def run(options: Options) -> None:
    """Run the operator with these options.

    Raises:
        StartError: it cannot start.
    """
    telemetry = Telemetry()
    api = await ApiServer.connect(telemetry)
    try:
        await Operator(options, api, telemetry).run()
    except OSError as error:
        raise StartError(f"--health-port {options.health_port}: {error}") from error
    finally:
        await api.close()


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in tools.COMMANDS:
        sys.exit(tools.main(arguments))
    options = parse_options(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(without_traces)
    # kopf tells every event of every watch at the level info.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLogger().level))
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    try:
        asyncio.run(run(options))
    except (StartError, ApiError) as error:
        print(f"pagoda-operator: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
