"""Which tokens the next step computes. Pure Python: no tensors, no clock, no globals."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pagoda_runtime.engine.block_pool import ROOT_HASH, BlockPool, hash_block
from pagoda_runtime.engine.limits import verify_prompt_fits, verify_queue_has_room
from pagoda_runtime.engine.messages import ScheduledRow
from pagoda_runtime.engine.request import Request, RequestStatus

# Share of the blocks that admission leaves free for the growth of running requests. Without it
# every admission soon costs a preemption.
WATERMARK = 0.03


@dataclass(slots=True)
class Plan:
    """One step. rows[i] belongs to requests[i]."""

    rows: list[ScheduledRow]
    requests: list[Request]
    admitted: list[Request]
    """Requests that run for the first time."""
    preempted: list[Request]
    num_tokens: int


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    num_tokens_of: dict[Request, int] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    def take(self, request: Request) -> None:
        num_tokens = min(request.num_pending_tokens, self.budget)
        self.num_tokens_of[request] = num_tokens
        self.budget -= num_tokens

    def give_back(self, request: Request) -> None:
        self.budget += self.num_tokens_of.pop(request, 0)


class Scheduler:
    """Hands out a budget of tokens per step: running requests first, then waiting ones.

    There is no prefill phase and no decode phase: a prompt is computed in chunks beside the
    decoding requests. When blocks run out, a running request is preempted: it gives its blocks
    back, keeps its tokens, and computes them again later.

    Nobody starves: `waiting` is in order of arrival, nobody overtakes its head, and the oldest
    running request is never preempted. So the oldest request of all either runs to its end, or
    waits only for running ones to end.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        assert max_num_seqs >= 1
        assert max_num_batched_tokens >= 1
        self.block_pool = block_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_waiting = max_num_waiting
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        # The last token of a request is never computed, so it needs no place in the cache.
        capacity = block_pool.num_blocks * block_pool.block_size
        self.max_num_tokens = min(max_model_len, capacity + 1)
        self.watermark_blocks = int(WATERMARK * block_pool.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.preemptions_total = 0
        self.finished_total = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptTooLong or QueueFull; then nothing of it is kept."""
        assert request.request_id not in self.requests, request.request_id
        verify_prompt_fits(
            request.num_prompt_tokens,
            max_model_len=self.max_model_len,
            num_blocks=self.block_pool.num_blocks,
            block_size=self.block_pool.block_size,
        )
        verify_queue_has_room(
            len(self.requests),
            max_num_seqs=self.max_num_seqs,
            max_num_waiting=self.max_num_waiting,
        )
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks; ids that are not known have ended already."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request, "abort")

    def schedule(self) -> Plan:
        draft = _Draft(budget=self.max_num_batched_tokens)
        self._schedule_running(draft)
        # Admission after a preemption would take the blocks that were just made free.
        if not draft.preempted:
            self._schedule_waiting(draft)
        return Plan(
            rows=[self._make_row(*item) for item in draft.num_tokens_of.items()],
            requests=list(draft.num_tokens_of),
            admitted=draft.admitted,
            preempted=draft.preempted,
            num_tokens=self.max_num_batched_tokens - draft.budget,
        )

    def update(self, plan: Plan, sampled_token_ids: Sequence[int]) -> list[Request]:
        """Take over the results of a step, one token for each row that samples, in row order.

        Returns the requests that got a token; their last token is the new one.
        """
        tokens = iter(sampled_token_ids)
        advanced = []
        for row, request in zip(plan.rows, plan.requests, strict=True):
            request.num_computed_tokens += len(row.token_ids)
            self._register_full_blocks(request)
            if row.sampling_params is not None:
                request.token_ids.append(next(tokens))
                advanced.append(request)
                self._finish_if_ended(request)
        assert next(tokens, None) is None, "more tokens than rows that sample"
        return advanced

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.block_pool.check(request.block_table for request in self.requests.values())
        assert len(self.requests) == len(self.running) + len(self.waiting)
        assert all(not request.block_table for request in self.waiting)

    def _schedule_running(self, draft: _Draft) -> None:
        # Decoding requests first: a long prompt must not delay anybody's next token.
        for request in sorted(self.running, key=lambda r: r.num_pending_tokens > 1):
            if draft.budget == 0:
                break
            if request.status is RequestStatus.RUNNING and self._make_room(request, draft):
                draft.take(request)

    def _make_room(self, request: Request, draft: _Draft) -> bool:
        """Extend the block table to all tokens, preempting others if need be.

        False: the request itself was preempted.
        """
        pool = self.block_pool
        missing = pool.num_blocks_for(request.num_tokens) - len(request.block_table)
        while missing > pool.num_free:
            victim = self._choose_victim()
            draft.give_back(victim)
            self._preempt(victim)
            draft.preempted.append(victim)
            if victim is request:
                return False
        if missing > 0:
            request.block_table.extend(pool.allocate(missing))
        return True

    def _choose_victim(self) -> Request:
        """The request that loses least, the oldest one excepted; of equals the youngest."""
        oldest = min(self.running, key=lambda r: r.arrival)
        # Alone, a request always has room, because it ends at max_num_tokens.
        assert len(self.running) > 1
        candidates = (request for request in self.running if request is not oldest)
        return min(candidates, key=lambda r: (r.num_computed_tokens, -r.arrival))

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.preemptions_total += 1
        place = 0
        while place < len(self.waiting) and self.waiting[place].arrival < request.arrival:
            place += 1
        self.waiting.insert(place, request)

    def _schedule_waiting(self, draft: _Draft) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs and draft.budget > 0:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_computed_tokens
                self.prefix_cache_queries += request.num_tokens
                self.prefix_cache_hits += request.num_computed_tokens
                draft.admitted.append(request)
            draft.take(request)

    def _admit(self, request: Request) -> bool:
        """Give the request blocks for all its tokens, or nothing.

        All at once although the prompt may be computed in chunks: half-computed prompts that wait
        for each other's blocks would deadlock.
        """
        pool = self.block_pool
        cached: list[int] = []
        if pool.enable_prefix_caching:
            # At least one token is computed, because sampling needs its logits.
            num_full_blocks = (request.num_tokens - 1) // pool.block_size
            self._extend_hashes(request, num_full_blocks)
            cached = pool.find_prefix(request.block_hashes[:num_full_blocks])
        num_new = pool.num_blocks_for(request.num_tokens) - len(cached)
        reserve = self.watermark_blocks if self.running else 0
        if pool.num_free - pool.num_free_among(cached) - num_new < reserve:
            return False
        pool.hold(cached)
        request.block_table = [*cached, *pool.allocate(num_new)]
        request.num_computed_tokens = len(cached) * pool.block_size
        request.num_registered_blocks = len(cached)
        return True

    def _make_row(self, request: Request, num_tokens: int) -> ScheduledRow:
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        num_blocks = self.block_pool.num_blocks_for(end)
        table = request.block_table
        return ScheduledRow(
            request_id=request.request_id,
            token_ids=request.token_ids[start:end],
            start=start,
            # Copied only for the chunks of a long prompt; a decode step copies nothing.
            block_table=table if num_blocks == len(table) else table[:num_blocks],
            sampling_params=request.sampling_params if end == request.num_tokens else None,
            seeds=(request.seed,),
        )

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        size, hashes = self.block_pool.block_size, request.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(hash_block(parent, request.token_ids[i * size : (i + 1) * size]))

    def _register_full_blocks(self, request: Request) -> None:
        """Blocks are found by others only after the step that filled them."""
        num_full = request.num_computed_tokens // self.block_pool.block_size
        if not self.block_pool.enable_prefix_caching or num_full == request.num_registered_blocks:
            return
        self._extend_hashes(request, num_full)
        for i in range(request.num_registered_blocks, num_full):
            self.block_pool.register(request.block_table[i], request.block_hashes[i])
        request.num_registered_blocks = num_full

    def _finish_if_ended(self, request: Request) -> None:
        params, token_id = request.sampling_params, request.token_ids[-1]
        if token_id in params.stop_token_ids:
            request.stop_reason = token_id
            self._finish(request, "stop")
        elif token_id in self.eos_token_ids and not params.ignore_eos:
            self._finish(request, "stop")
        elif (
            request.num_output_tokens == params.max_tokens
            or request.num_tokens >= self.max_num_tokens
        ):
            self._finish(request, "length")

    def _finish(self, request: Request, reason: str) -> None:
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        self.finished_total += 1
        del self.requests[request.request_id]

    def _release_blocks(self, request: Request) -> None:
        self.block_pool.release(request.block_table)
        # A new list: the rows of an earlier plan may still show the old one.
        request.block_table = []
        request.num_computed_tokens = 0
