"""Make the cluster be what one LLMService asks for.

`Reconciler.reconcile(key)` takes the object and everything that belongs to it as the API server
told of them last (`recall`), plans, writes what the plan says and then the status, if it differs.
It never depends on what changed, on having seen an event, or on how an earlier pass ended: a pass
may be cut off after any write, and the next one goes on from what it finds. All that it remembers
saves work (`plan.Applied`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime

from pagoda_operator.cause import Cause, steady
from pagoda_operator.causes import cause_of_refusal, find_cause
from pagoda_operator.checks import Checks, Verdict
from pagoda_operator.cluster import ApiError, ApiServer, NotFound, Refused, Unavailable
from pagoda_operator.decode import SpecError
from pagoda_operator.events import render_events
from pagoda_operator.execute import delete_failed, execute
from pagoda_operator.loads import with_progress
from pagoda_operator.names import (
    CHILD_KINDS,
    KIND,
    MANAGER,
    ChildRef,
    Key,
    Manifest,
    engine_name,
    is_leaving,
    same_object,
)
from pagoda_operator.observe import World, observe, seconds_to_next_look
from pagoda_operator.ownership import replicas_owner
from pagoda_operator.plan import (
    WAIT_FOR_DELETION_SECONDS,
    Memory,
    Plan,
    is_controlled_by,
    make_plan,
)
from pagoda_operator.poll import Poller
from pagoda_operator.preload import find_preloading
from pagoda_operator.recall import Recall
from pagoda_operator.render import render_children, revision_of
from pagoda_operator.rollout import Rollout, choose_rollout
from pagoda_operator.spec import LLMService, Strategy, parse
from pagoda_operator.status import (
    Conditions,
    Counts,
    autoscaling_condition,
    failed_status,
    is_seen,
    make_status,
    stamp,
)

logger = logging.getLogger(__name__)

# A quota or a webhook of others may be the reason: nobody tells when it is gone.
REFUSED_RETRY_SECONDS = 15.0
# The first status waits until the pods exist, and until other new services have their children.
FIRST_STATUS_SECONDS = 0.3
# What holds the name has no label of ours: nobody tells when it goes.
CONFLICT_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What one pass does.

    blocker: why the pods wait. preflight: `status.preflight`.
    """

    rollout: Rollout
    target_replicas: int
    plan: Plan
    blocker: Cause | None
    preflight: Manifest | None


@dataclass(slots=True)
class Reconciler:
    """Reconciles any LLMService; at most one pass per key at a time."""

    cluster: ApiServer
    poller: Poller
    _: KW_ONLY
    engine_image: str
    operator_namespace: str | None = None
    instance: str = "pagoda-operator"
    """Who tells events."""
    checks: Checks | None = None
    served: frozenset[str] = frozenset()
    """Those of OPTIONAL_KINDS that the cluster knows; the caller looks now and then."""
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    clock: Callable[[], float] = time.monotonic
    recall: Recall | None = None
    """None: everything is read again in every pass."""
    _recall: Recall = field(init=False)
    _memories: dict[Key, Memory] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._recall = self.recall or Recall(self.cluster, None, self.clock)

    async def reconcile(self, key: Key) -> float | None:
        """One pass. Returns after how many seconds to come again, None if only upon a change.

        Raises:
            ApiError: the API server refused or did not answer; come again later.
        """
        try:
            return await self._reconcile(key)
        except ApiError:
            # What is remembered may be the reason, and anything may have happened by the next try.
            self._recall.forget(key)
            raise

    async def _reconcile(self, key: Key) -> float | None:
        manifest = _unless_leaving(await self._recall.get(key, ChildRef(KIND, key.name)))
        if manifest is None:
            # The garbage collector deletes the children: they name their owner.
            self.forget(key)
            return None
        try:
            service = parse(manifest)
        except SpecError as error:
            await self._reject(key, manifest, str(error))
            return None
        return await self._converge(service, manifest)

    def forget(self, key: Key) -> None:
        """The LLMService is gone."""
        self._memories.pop(key, None)
        self._recall.forget(key)
        self.poller.forget(key)
        self.poller.reports.forget(key)
        self.poller.loads.forget(key)
        if self.checks is not None:
            self.checks.forget(key)

    async def _converge(self, service: LLMService, manifest: Manifest) -> float | None:
        """The pass of a spec that is understood."""
        key, previous = service.key, manifest.get("status", {})
        world = await self._look(service, manifest, self._render(service, self.engine_image))
        memory, now = self._memories.setdefault(key, Memory()), self.clock()
        decision = self._decide(service, previous, world, memory, now)
        plan, deployment = (
            decision.plan,
            world.own(service, ChildRef("Deployment", engine_name(key.name))),
        )
        if any(it.adopts or (it.live is None and is_seen(previous)) for it in plan.applies):
            # A deletion takes the children, or, with them left behind, their owner: given back, the
            # former would be made for nothing, and the latter would go with it.
            found = _unless_leaving(await self.cluster.get(KIND, key.namespace, key.name))
            if found is None or found["metadata"]["uid"] != service.uid:
                self.forget(key)
                return None if found is None else WAIT_FOR_DELETION_SECONDS
        failure: Refused | Unavailable | None = None
        try:
            deployment = await execute(self._recall, key, plan, memory, now) or deployment
            memory.scaled = decision.target_replicas
        except (Refused, Unavailable) as error:
            failure = error
            self._recall.forget(key)
        is_complete = world.is_listed or all(apply.live is None for apply in plan.applies)
        memory.is_swept |= is_complete and failure is None and not plan.conflicts
        if failure is None and plan.applies and not is_seen(previous):
            return FIRST_STATUS_SECONDS
        hindrance = _find_hindrance(plan, failure) or decision.blocker
        hindrance = hindrance or memory.contests.find_cause(plan.held, now)
        # The queue tells of the first trouble, and tries the status again as well.
        with contextlib.suppress(*([ApiError] if isinstance(failure, Unavailable) else [])):
            await self._report(manifest, service, world, deployment, decision, hindrance)
        if isinstance(failure, Unavailable):
            raise failure
        if failure is not None:
            return REFUSED_RETRY_SECONDS
        if plan.conflicts:
            self.poller.forget(key)
            return CONFLICT_RETRY_SECONDS
        self.poller.watch(service, decision.target_replicas, world.pods)
        await delete_failed(self._recall, key, world.pods)
        looks = [
            plan.requeue_seconds,
            decision.rollout.next_look_seconds,
            seconds_to_next_look([*world.pods, *world.loaders], self.now()),
            memory.contests.seconds_to_next_look(plan.held, now),
        ]
        return min((seconds for seconds in looks if seconds), default=None)

    def _decide(
        self, service: LLMService, previous: Manifest, world: World, memory: Memory, now: float
    ) -> _Decision:
        """What is to be done, from what there is."""
        ref = ChildRef("Deployment", engine_name(service.key.name))
        deployment = world.own(service, ref)
        rollout = choose_rollout(
            service,
            deployment,
            world.pods,
            world.events,
            default_image=self.engine_image,
            now=self.now(),
        )
        wanted = self._render(service, rollout.image, rollout.strategy)
        target = self.poller.target(service, previous, deployment)
        plan = make_plan(service, wanted, world.children, memory, target_replicas=target, now=now)
        verdict = Verdict()
        if self.checks is not None:
            verdict = self.checks.find(service, previous, wanted[ref], deployment)
        plan, blocker = _hold_pods(plan, verdict, service, wanted, world)
        return _Decision(
            rollout=rollout,
            target_replicas=target,
            plan=plan,
            blocker=blocker,
            preflight=verdict.fields,
        )

    def _render(
        self, service: LLMService, engine_image: str, strategy: Strategy | None = None
    ) -> dict[ChildRef, Manifest]:
        return render_children(
            service,
            engine_image=engine_image,
            strategy=strategy,
            operator_namespace=self.operator_namespace,
            served=self.served,
        )

    async def _look(
        self, service: LLMService, manifest: Manifest, wanted: Collection[ChildRef]
    ) -> World:
        """What there is; where it cannot be read, the status says so."""
        key, previous = service.key, manifest.get("status", {})
        is_new = key not in self._memories and not is_seen(previous)
        memory = self._memories.get(key, Memory())
        named = {**dict.fromkeys(wanted), **memory.applied}
        kinds = ("Pod",) if memory.is_swept else (*CHILD_KINDS, *self.served, "Pod")
        try:
            return await observe(self._recall, key, named, () if is_new else kinds, self.now())
        except (Refused, Unavailable) as error:
            # One read that fails says nothing of what is in force already.
            is_in_force = previous.get("observedGeneration") == service.generation
            if isinstance(error, Refused) or not is_in_force:
                with contextlib.suppress(ApiError):
                    told = failed_status(_cause_of_error(error), None, previous)
                    await self._write_status(manifest, *told)
            raise

    async def _reject(self, key: Key, manifest: Manifest, message: str) -> None:
        """Say that the spec is not understood, and what becomes of the pods meanwhile."""
        self.poller.forget(key)
        self.poller.loads.forget(key)
        live = await self.cluster.get("Deployment", key.namespace, engine_name(key.name))
        if live is not None and not is_controlled_by(live, manifest["metadata"]["uid"]):
            live = None
        cause = Cause("InvalidSpec", message, True)
        told = failed_status(cause, Counts.of(live), manifest.get("status", {}))
        await self._write_status(manifest, *told)

    async def _report(
        self,
        manifest: Manifest,
        service: LLMService,
        world: World,
        deployment: Manifest | None,
        decision: _Decision,
        hindrance: Cause | None,
    ) -> None:
        cause, model = hindrance, None
        if deployment is not None:
            pods, revision = world.pods, revision_of(deployment)
            model = self.poller.reports.find(service.key, pods, revision)
            cause = cause or find_cause(service.spec, deployment, pods, revision, world.events)
        loads = self.poller.loads.find(service.key, world.pods)
        cause = with_progress(cause, loads)
        front = world.own(service, ChildRef("Service", service.key.name))
        status, conditions = make_status(
            service,
            deployment=deployment,
            cause=cause,
            desired_replicas=decision.target_replicas,
            is_applied=hindrance is None,
            is_reachable=hindrance is None or front is not None,
            model=manifest.get("status", {}).get("model") if model is None else model,
            preflight=decision.preflight,
            loads=loads,
            rollout=decision.rollout.fields(),
        )
        conditions |= autoscaling_condition(
            service.spec,
            replicas_owner=replicas_owner(manifest),
            blindness=self.poller.blindness(service.key),
        )
        await self._write_status(manifest, status, conditions)

    async def _write_status(
        self, manifest: Manifest, fields: Manifest, conditions: Conditions
    ) -> None:
        previous, generation = manifest.get("status", {}), manifest["metadata"]["generation"]
        status = stamp(fields, conditions, previous, generation, self.now())
        if status == previous:
            return
        for event in render_events(manifest, status, self.now(), instance=self.instance):
            # Told before it is written: what fails in between is told once, as it has a name.
            with contextlib.suppress(ApiError):
                await self.cluster.create_event(event)
        try:
            told = same_object(manifest, status=status)
            live = await self.cluster.apply_status(told, manager=MANAGER)
            self._recall.keep(Key.of(live), live)
        except NotFound:
            # No watch may ever tell of it.
            metadata = manifest["metadata"]
            self._recall.forget(Key(metadata["namespace"], metadata["name"]))
            logger.info("%s is gone", metadata["name"])


def _unless_leaving(manifest: Manifest | None) -> Manifest | None:
    return None if manifest is None or is_leaving(manifest) else manifest


def _hold_pods(
    plan: Plan,
    verdict: Verdict,
    service: LLMService,
    wanted: Mapping[ChildRef, Manifest],
    world: World,
) -> tuple[Plan, Cause | None]:
    """The plan, without what has to wait, and why it has to."""
    if verdict.cause is not None:
        return plan.without("Job", "Deployment"), verdict.cause
    blocker = find_preloading(service, wanted, world.children, world.loaders, world.events)
    if blocker is None:
        return plan, None
    # Of a suspended service nothing is loaded, and its replicas do not wait for that.
    return plan.without("Deployment"), None if service.spec.suspend else blocker


def _find_hindrance(plan: Plan, failure: ApiError | None) -> Cause | None:
    """Why the children are not what the spec asks for, if they are not."""
    if plan.conflicts:
        return Cause("NameConflict", "; ".join(plan.conflicts), True)
    if failure is not None:
        return _cause_of_error(failure)
    if plan.waiting:
        return Cause("WaitingForDeletion", "; ".join(plan.waiting), False)
    return None


def _cause_of_error(error: ApiError) -> Cause:
    message = steady(str(error))
    if isinstance(error, Refused):
        return cause_of_refusal("Refused", message)
    return Cause("ApiServerError", f"The API server fails, and is asked again: {message}", False)
