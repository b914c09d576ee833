"""The engine's step: schedule, execute, take over the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pagoda_runtime.engine.deltas import DeltaBuffer
from pagoda_runtime.engine.progress import Deltas, advance
from pagoda_runtime.engine.request import Request, derive_seed
from pagoda_runtime.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    EngineRequest,
    EngineStats,
    RowOutput,
    ScheduledRow,
    StepOutput,
)


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
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> StepInFlight:
        """Copy the blocks and compute the rows, after those of the steps before; or begin to."""
        ...


class EngineCore:
    """Requests in, steps out; no process, no socket, no clock of its own.

    With `overlap` the next step is scheduled and handed to the runner before the results of one are
    asked for, and its rows may end with a token that is still being computed
    (`ScheduledRow.row_in_flight`).
    """

    def __init__(
        self, runner: Runner, config: SchedulerConfig, *, seed: int = 0, overlap: bool = False
    ) -> None:
        self.runner = runner
        self.seed = seed
        self.scheduler = Scheduler(config)
        self.overlap = overlap
        self._num_arrived = 0
        self._deltas = DeltaBuffer()
        self._in_flight: tuple[SchedulerOutput, StepInFlight] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests) or self._in_flight is not None

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises: PromptTooLong, RequestError or QueueFull; then nothing of it is kept.
        """
        params = request.sampling_params
        # A request without a seed has one that is reproducible for equal engine seeds and ids.
        seed = params.fixed_seed
        self.scheduler.add(
            Request(
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
        )
        self._num_arrived += 1

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; their blocks are free at once. No delta follows."""
        self.scheduler.abort(request_ids)

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
        scheduled = self.scheduler.schedule()
        for request in scheduled.admitted:
            request.queue_seconds = max(0.0, now - request.arrival_seconds)
        begun = None
        if scheduled.rows:
            begun = scheduled, self.runner.submit(scheduled.rows, scheduled.copies)
        ending = begun
        if self.overlap:
            ending, self._in_flight = self._in_flight, begun
        assert begun or ending or not self.scheduler.requests, "there is work, but not in a step"
        deltas: Deltas = []
        if ending is not None:
            deltas = advance(self.scheduler, ending[0], ending[1].result())
        return StepOutput(
            deltas=self._deltas.pass_on(deltas, self.scheduler.requests),
            stats=self._make_stats(scheduled),
        )

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()

    def close(self) -> None:
        """Wait for a step in flight."""
        if self._in_flight is not None:
            self._in_flight[1].result()

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
