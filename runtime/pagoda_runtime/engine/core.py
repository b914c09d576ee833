"""The engine's step: schedule, execute, take over the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pagoda_runtime.engine.deltas import DeltaBuffer
from pagoda_runtime.engine.parking import Parking
from pagoda_runtime.engine.progress import Deltas, advance
from pagoda_runtime.engine.request import Request, derive_seed
from pagoda_runtime.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from pagoda_runtime.errors import QueueFull, RequestError
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    EngineRequest,
    EngineStats,
    Masks,
    RequestDelta,
    RowOutput,
    ScheduledRow,
    StepOutput,
)

if TYPE_CHECKING:
    from pagoda_runtime.grammar.compiler import Grammars

# Between two looks at what else there is to do, while nothing but grammars is waited for.
_PARKED_SECONDS = 0.005


class StepInFlight(Protocol):
    """A step that a runner has begun."""

    def result(self) -> list[RowOutput]:
        """One output for each row, once they are there."""
        ...


class Runner(Protocol):
    """What executes steps: `execution.runner.ModelRunner`, or a fake one in tests."""

    @property
    def ready_facts(self) -> EngineReady: ...

    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> StepInFlight:
        """Copy the blocks and compute the rows, after those of the steps before; or begin to.

        masks: those of the rows with grammars, if there are any.
        """
        ...


class _Begun(NamedTuple):
    """A step that the runner has begun."""

    scheduled: SchedulerOutput
    step: StepInFlight
    masks: Masks | None

    def result(self) -> list[RowOutput]:
        if self.masks is not None:
            # Whatever the runner did with them: from here on the matchers are used again.
            self.masks()
        return self.step.result()


class EngineCore:
    """Requests in, steps out; no process, no socket, no clock of its own.

    With `overlap` the next step is scheduled and handed to the runner before the results of one are
    asked for, and its rows may end with a token that is still being computed
    (`ScheduledRow.row_in_flight`). Without grammars requests that have one are refused.
    """

    def __init__(
        self,
        runner: Runner,
        config: SchedulerConfig,
        *,
        seed: int = 0,
        overlap: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        self.runner = runner
        self.seed = seed
        self.scheduler = Scheduler(config)
        self.overlap = overlap
        self._num_arrived = 0
        self._deltas = DeltaBuffer()
        self._in_flight: _Begun | None = None
        self._grammars = grammars
        self._parking = None if grammars is None else Parking(grammars)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests or self._parking) or self._in_flight is not None

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises: PromptTooLong, RequestError or QueueFull; then nothing of it is kept.
        """
        params = request.sampling_params
        if params.grammar is not None:
            if self._parking is None:
                raise RequestError("This engine has no grammars; leave it out.", param="grammar")
            params = msgspec.structs.replace(params, grammar="")
        # A request without a seed has one that is reproducible for equal engine seeds and ids.
        seed = params.fixed_seed
        made = Request(
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            sampling_params=params,
            seed=derive_seed(self.seed, request.request_id) if seed is None else seed,
            arrival=self._num_arrived,
            arrival_seconds=request.arrival_seconds,
            priority=request.priority,
            cache_salt=request.cache_salt,
            stream_interval=request.stream_interval,
            second_text_start=request.second_text_start,
        )
        if self._parking is not None and request.sampling_params.grammar is not None:
            self._parking.enter(made, request.sampling_params.grammar)
        else:
            self.scheduler.add(made)
        self._num_arrived += 1

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; their blocks are free at once. No delta follows."""
        request_ids = list(request_ids)
        self.scheduler.abort(request_ids)
        if self._parking is not None:
            self._parking.drop(request_ids)

    def finish_choices(self, request_id: str, indices: Iterable[int]) -> None:
        """End some choices of a request. No delta of theirs follows."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            for sequence in [s for s in request.sequences if s.index in set(indices)]:
                self.scheduler.finish(sequence, "abort")

    def reset_prefix_cache(self) -> int:
        """Let no later request find what is cached now; the number of blocks that held it."""
        return self.scheduler.block_pool.reset_prefix_cache()

    def step(self, now: float) -> StepOutput:
        """Compute one step; `now` is time.time(). Without work it only reports the state.

        With overlap the deltas are those of the step before.
        """
        refused = self._leave_parking(now)
        scheduled = self.scheduler.schedule()
        for request in scheduled.admitted:
            request.queue_seconds = max(0.0, now - request.arrival_seconds)
        begun = None
        if scheduled.rows:
            masks = self._start_masks(scheduled)
            step = self.runner.submit(scheduled.rows, scheduled.copies, masks)
            begun = _Begun(scheduled, step, masks)
        ending = begun
        if self.overlap:
            ending, self._in_flight = self._in_flight, begun
        assert begun or ending or not self.scheduler.requests, "there is work, but not in a step"
        deltas: Deltas = []
        if ending is not None:
            deltas = advance(self.scheduler, ending.scheduled, ending.result())
        return StepOutput(
            deltas=refused + self._deltas.pass_on(deltas, self.scheduler.requests),
            stats=self._make_stats(scheduled),
        )

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()

    def close(self) -> None:
        """Wait for a step in flight."""
        if self._in_flight is not None:
            self._in_flight.result()

    def _start_masks(self, scheduled: SchedulerOutput) -> Masks | None:
        """Those of the rows with grammars, computed beside the step."""
        matchers = [
            sequence.matcher
            for row, sequence in zip(scheduled.rows, scheduled.sequences, strict=True)
            if row.has_grammar and sequence.matcher is not None
        ]
        if self._grammars is None or not matchers:
            return None
        return self._grammars.start_masks(matchers)

    def _leave_parking(self, now: float) -> list[RequestDelta]:
        """Queue the requests whose grammars are there; the ends of those that fail."""
        parking, ends = self._parking, list[RequestDelta]()
        if not parking:
            return ends
        if not self.scheduler.requests and self._in_flight is None:
            parking.wait(_PARKED_SECONDS)
        for request, error in parking.leave(now):
            try:
                if error is not None:
                    raise error
                self.scheduler.add(request)
            except (RequestError, QueueFull) as refusal:
                ends.append(end_refused(request.request_id, refusal))
        return ends

    def _make_stats(self, scheduled: SchedulerOutput) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.block_pool
        num_held_slots = pool.num_used * pool.block_size
        has_cache = scheduler.facts.pooler is None
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=scheduler.facts.max_num_seqs,
            kv_usage=pool.num_used / pool.num_blocks if has_cache else 0.0,
            kv_waste=scheduler.block_tables.num_unfilled_slots(scheduler.running) / num_held_slots
            if num_held_slots and has_cache
            else 0.0,
            preemptions_total=scheduler.preemptions_total,
            finished_total=scheduler.finished_total,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_scheduled_tokens=scheduled.num_scheduled_tokens,
        )


def end_refused(request_id: str, refusal: RequestError | QueueFull) -> RequestDelta:
    """The only delta of a request that cannot be served."""
    return RequestDelta(
        request_id=request_id,
        new_token_ids=[],
        finish_reason="abort",
        is_last=True,
        error=refusal.message,
    )
