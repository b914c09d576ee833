"""The engine's step: schedule, execute, update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from pagoda_runtime.engine.block_pool import BlockPool
from pagoda_runtime.engine.messages import (
    BlockCopy,
    EngineRequest,
    EngineStats,
    RequestDelta,
    RowOutput,
    ScheduledRow,
    StepOutput,
)
from pagoda_runtime.engine.request import Request
from pagoda_runtime.engine.scheduler import Plan, Scheduler


class Runner(Protocol):
    """What executes a plan: `execution.runner.ModelRunner`, or a fake one in tests."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        """Copy the blocks, compute the rows, and return one output for each row."""
        ...


class EngineCore:
    """Requests in, steps out; no process, no socket, no clock of its own."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        enable_prefix_caching: bool,
        seed: int,
    ) -> None:
        self.runner = runner
        self.seed = seed
        self.scheduler = Scheduler(
            BlockPool(
                runner.num_blocks, runner.block_size, enable_prefix_caching=enable_prefix_caching
            ),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_waiting=max_num_waiting,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
        )
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises PromptTooLong or QueueFull; then nothing of it is kept."""
        params = request.sampling_params
        self.scheduler.add(
            Request(
                request_id=request.request_id,
                token_ids=list(request.prompt_token_ids),
                sampling_params=params,
                seed=self._derive_seed(request.request_id) if params.seed is None else params.seed,
                arrival=self._num_arrived,
                arrival_seconds=request.arrival_seconds,
                num_prompt_tokens=len(request.prompt_token_ids),
            )
        )
        self._num_arrived += 1

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; their blocks are free at once. No delta follows."""
        self.scheduler.abort(request_ids)

    def step(self, now: float) -> StepOutput:
        """Compute one step; `now` is time.time(). Without work it only reports the state."""
        plan = self.scheduler.schedule()
        for request in plan.admitted:
            request.queue_seconds = max(0.0, now - request.arrival_seconds)
        outputs = self.runner.execute(plan.rows) if plan.rows else []
        sampled = [token_id for output in outputs for token_id in output.token_ids]
        assert plan.rows or not self.has_work, "there is work, but nothing was scheduled"
        advanced = self.scheduler.update(plan, sampled)
        return StepOutput(
            deltas=[_make_delta(request) for request in advanced], stats=self._make_stats(plan)
        )

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()

    def _derive_seed(self, request_id: str) -> int:
        """A seed for a request that brings none: reproducible for equal engine seeds and ids."""
        digest = hashlib.sha256(f"{self.seed}/{request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def _make_stats(self, plan: Plan) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.block_pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=scheduler.max_num_seqs,
            kv_usage=pool.num_used / pool.num_blocks,
            preemptions_total=scheduler.preemptions_total,
            finished_total=scheduler.finished_total,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_scheduled_tokens=plan.num_tokens,
        )


def _make_delta(request: Request) -> RequestDelta:
    is_first = request.num_output_tokens == 1
    return RequestDelta(
        request_id=request.request_id,
        new_token_ids=[request.token_ids[-1]],
        finish_reason=request.finish_reason,
        is_last=request.finish_reason is not None,
        stop_reason=request.stop_reason,
        num_cached_tokens=request.num_cached_tokens,
        queue_seconds=request.queue_seconds if is_first else None,
    )
