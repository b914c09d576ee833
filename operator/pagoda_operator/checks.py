"""What preflight says of services whose engines are about to change, before they do.

A model's files are read beside the passes, once for all services that serve it, and kept; a pass
only ever waits for the first reading, by coming again when it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from pagoda_operator.cause import Cause
from pagoda_operator.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from pagoda_operator.hub import Hub, Unreachable, Unreadable
from pagoda_operator.inspection import HF, is_for_job
from pagoda_operator.inspections import Inspections
from pagoda_operator.names import Key, Manifest
from pagoda_operator.preflight import Preflight, check, of_checkpoint_error, unchecked
from pagoda_operator.render import revision_of
from pagoda_operator.spec import LLMService, Model

logger = logging.getLogger(__name__)

HUB_VARIABLE = "HF_ENDPOINT"
MAX_READ_AT_ONCE = 4
MAX_JOBS_AT_ONCE = 8
FRESH_SECONDS = 300.0
"""How long what a hub told is not asked for again."""
INSPECTED_FRESH_SECONDS = 3600.0
"""The same of a Job, which costs more."""
UNREACHABLE_SECONDS = 60.0
"""How long a hub that is not there is not asked at all."""
MAX_MODELS = 500
READING = Cause("CheckingModel", "The model's config.json is being read.", False)

Outcome = Checkpoint | CheckpointError | Unreadable
Source = tuple[str | None, ...]
"""What tells models apart: of a hub the uri and revision; of a Job namespace and Secret as well."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """cause: why the engines must not be changed. fields: `status.preflight`, if there is any."""

    cause: Cause | None = None
    fields: Manifest | None = None


@dataclass(slots=True)
class _Read:
    """A model that was read, or is being read."""

    outcome: Outcome | None = None
    etag: str | None = None
    read_at: float = 0.0
    waiting: set[Key] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


Reading = Callable[[_Read], Awaitable[Outcome | None]]
"""Finds out what a model is, from the start or from what was read before."""


@dataclass(slots=True)
class Checks:
    """Checks models, of one hub and by Jobs; what neither reads is not checked.

    Args:
        hub: None: public models are not checked.
        inspections: None: models on claims are not checked, those with a token as public ones.
        clock: seconds of a monotonic clock.
        on_change: called with a service whose verdict may be another one now.
    """

    hub: Hub | None
    clock: Callable[[], float]
    on_change: Callable[[Key], None]
    inspections: Inspections | None = None
    _models: dict[Source, _Read] = field(default_factory=dict, init=False)
    _passed: dict[Key, tuple[str, Manifest | None]] = field(default_factory=dict, init=False)
    """The revision of pods that was let pass last, and what was found."""
    _slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_READ_AT_ONCE), init=False
    )
    _job_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_JOBS_AT_ONCE), init=False
    )
    _unreachable: tuple[float, Unreadable] | None = field(default=None, init=False)

    def find(
        self,
        service: LLMService,
        status: Manifest,
        wanted: Manifest,
        deployment: Manifest | None,
    ) -> Verdict:
        """What stands in the way of the wanted Deployment; pods that are there need no forecast.

        Args:
            status: as it was written last.
            deployment: the live one.
        """
        revision = revision_of(wanted)
        if deployment is None or revision_of(deployment) != revision:
            verdict = self.judge(service)
            if verdict.cause is None:
                self._passed[service.key] = revision, verdict.fields
            return verdict
        passed, fields = self._passed.get(service.key, ("", None))
        if passed == revision:
            return Verdict(fields=fields)
        told = status.get("preflight", {})
        return Verdict(fields=None if told.get("result") == "Failed" else told)

    def forget(self, key: Key) -> None:
        """The service is gone."""
        self._passed.pop(key, None)

    def judge(self, service: LLMService) -> Verdict:
        """Of a service whose pods would change now."""
        spec, model = service.spec, service.spec.model
        source: Source = (model.uri, model.revision)
        if self.inspections is not None and is_for_job(service):
            secret = model.credentials_secret_ref
            source = (*source, service.key.namespace, None if secret is None else secret.name)
            inspect = partial(self._inspect, self.inspections, service)
            outcome = self._find(service.key, source, inspect, INSPECTED_FRESH_SECONDS)
        elif self.hub is None:
            return Verdict()
        elif not model.uri.startswith(HF):
            return Verdict(fields=unchecked(_describe_unread(service)))
        elif (other := _find_other_hub(service, self.hub)) is not None:
            return Verdict(fields=unchecked(other))
        else:
            ask = partial(self._ask, self.hub, model)
            outcome = self._find(service.key, source, ask, FRESH_SECONDS)
        if outcome is None:
            return Verdict(READING)
        if isinstance(outcome, Unreadable):
            return Verdict(fields=unchecked(f"The model was not checked: {outcome}."))
        if isinstance(outcome, CheckpointError):
            return _verdict(of_checkpoint_error(outcome))
        return _verdict(check(spec, outcome))

    async def close(self) -> None:
        tasks = [read.task for read in self._models.values() if read.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.hub is not None:
            await self.hub.close()

    def _find(
        self, key: Key, source: Source, reading: Reading, fresh_seconds: float
    ) -> Outcome | None:
        """What is known of a model; None: wait for it. What is old is read anew meanwhile."""
        read = self._models.get(source)
        if read is None:
            self._make_room()
            read = self._models[source] = _Read()
        is_old = read.outcome is None or self.clock() - read.read_at > fresh_seconds
        if read.task is None and is_old:
            read.task = asyncio.get_running_loop().create_task(self._read(reading, read))
        if read.task is not None:
            read.waiting.add(key)
        return read.outcome

    async def _read(self, reading: Reading, read: _Read) -> None:
        before = read.outcome
        try:
            read.outcome = await reading(read)
        except Unreachable as error:
            # What was read before still holds, as far as anybody knows.
            read.outcome = before or error
        except Unreadable as error:
            read.outcome, read.etag = error, None
        except CheckpointError as error:
            read.outcome = error
        except Exception:
            logger.exception("a model cannot be checked")
            read.outcome = Unreadable("an error of the operator; see its log")
        finally:
            read.read_at, read.task = self.clock(), None
        waiting, read.waiting = read.waiting, set()
        if read.outcome != before:
            for key in sorted(waiting):
                self.on_change(key)

    async def _ask(self, hub: Hub, model: Model, read: _Read) -> Outcome | None:
        """What the hub tells of a model; what was known if that is still so."""
        name = model.uri.removeprefix(HF)
        async with self._slots:
            self._require_reachable()
            try:
                answer = await hub.read(name, model.revision, read.etag)
            except Unreachable as error:
                self._unreachable = (self.clock() + UNREACHABLE_SECONDS, error)
                raise
        if answer is None:
            return read.outcome
        read.etag = answer.etag
        return read_checkpoint(answer.config, answer.tensors)

    async def _inspect(self, inspections: Inspections, service: LLMService, read: _Read) -> Outcome:
        async with self._job_slots:
            return await inspections.read(service)

    def _require_reachable(self) -> None:
        """Raises Unreachable, without asking, for a while after a hub was not there."""
        if self._unreachable is None:
            return
        until, error = self._unreachable
        if self.clock() < until:
            raise error
        self._unreachable = None

    def _make_room(self) -> None:
        """Forget what was read first, so that names alone do not fill the memory."""
        done = [source for source, read in self._models.items() if read.task is None]
        for source in done[: max(0, len(self._models) + 1 - MAX_MODELS)]:
            del self._models[source]


def _describe_unread(service: LLMService) -> str:
    """Why a model is not looked up that is no hub's."""
    scheme, remedy = service.spec.model.uri.partition("://")[0], ""
    if is_for_job(service):
        remedy = "; a Job does, where the operator has --inspection-image (inspectionJobs)"
    text = "The model was not checked: the operator itself does not read models of"
    return f"{text} {scheme}://{remedy}."


def _find_other_hub(service: LLMService, hub: Hub) -> str | None:
    """Why the engine may get its model from elsewhere: no pod chooses what is asked here."""
    own = hub.endpoint.rstrip("/")
    for variable in service.spec.pod_template.env:
        named = str(variable.get("value", "")).rstrip("/")
        if variable["name"] == HUB_VARIABLE and named != own:
            return (
                f"The model was not checked: {HUB_VARIABLE} of podTemplate.env is not the "
                f"operator's hub, {own}."
            )
    return None


def _verdict(found: Preflight) -> Verdict:
    return Verdict(found.problems[0] if found.problems else None, found.fields())
