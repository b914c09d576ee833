"""Which tokens the next step computes. Pure Python: no tensors, no clock, no globals."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from pagoda_runtime.engine.beam import BeamSearch
from pagoda_runtime.engine.block_pool import BlockPool
from pagoda_runtime.engine.block_tables import BlockTables
from pagoda_runtime.engine.request import Request, Sequence, Status
from pagoda_runtime.engine.rows import make_row
from pagoda_runtime.ipc.limits import most_tokens, verify_fits, verify_queue_has_room
from pagoda_runtime.ipc.messages import BlockCopy, EngineReady, FinishReason, ScheduledRow

# Share of the blocks that admission leaves free for the growth of running requests. Without it
# every admission soon costs a preemption.
WATERMARK = 0.03
_CHUNK_MULTIPLE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What a scheduler goes by: the facts that clients know too, and rules of its own."""

    facts: EngineReady
    long_prefill_token_threshold: int
    """Prompt tokens of a step in which others decode; what bounds the time that they wait for their
    next token. Where doubling_depth says so, it shrinks with depth."""
    max_num_waiting: int
    enable_prefix_caching: bool = True


@dataclass(slots=True)
class SchedulerOutput:
    """One step. rows[i] belongs to sequences[i]."""

    rows: list[ScheduledRow]
    sequences: list[Sequence]
    copies: list[BlockCopy]
    """Done before anything is written."""
    admitted: list[Request]
    """Requests that run for the first time."""
    num_scheduled_tokens: int


@dataclass(slots=True)
class _Schedule:
    """What a step has so far, and what it can still take."""

    token_budget: int
    num_decoding: int = 0
    """Sequences in the step that compute their last token."""
    num_scheduled_tokens: dict[Sequence, int] = field(default_factory=dict)
    source_of: dict[int, int] = field(default_factory=dict)
    """Block copies, by target. That of a sequence that is preempted is done all the same: the
    prefix cache keeps the target, and who takes it instead writes after the copies."""
    admitted: list[Request] = field(default_factory=list)
    has_preempted: bool = False

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self.num_scheduled_tokens[sequence] = num_tokens
        self.token_budget -= num_tokens
        self.num_decoding += sequence.num_pending_tokens == 1

    def give_back(self, sequence: Sequence) -> None:
        if sequence in self.num_scheduled_tokens:
            self.token_budget += self.num_scheduled_tokens.pop(sequence)
            self.num_decoding -= sequence.num_pending_tokens == 1


class Scheduler:
    """Hands out a budget of tokens per step: running sequences first, then waiting ones.

    There is no prefill phase and no decode phase: a prompt is computed in chunks beside the
    decoding sequences. When blocks run out, a running sequence is preempted: it gives its blocks
    back, keeps its tokens, and computes them again later. Beams run in step with each other and
    are preempted together; they begin again, because alone they share the most blocks.

    Nobody starves: `waiting` is in order of rank, nobody overtakes its head, and the first of the
    running is never preempted. So the first of all either runs to its end, or waits only for
    running ones to end; and only a bounded number of later arrivals can rank before it.

    A step may be scheduled before the one before it has run (`Sequence.num_in_flight`): everything
    here counts tokens from the moment they are handed out.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.facts = facts = config.facts
        assert facts.max_num_seqs >= 1
        assert facts.max_num_batched_tokens >= 1
        assert config.long_prefill_token_threshold >= 1
        num_blocks, block_size = facts.num_blocks, facts.block_size
        has_cache = facts.pooler is None
        if not has_cache:
            # No keys and values are kept: a sequence's block is its place in a step.
            num_blocks, block_size = facts.max_num_seqs, facts.max_model_len
        self.block_pool = BlockPool(
            num_blocks,
            block_size,
            enable_prefix_caching=has_cache and config.enable_prefix_caching,
        )
        self.block_tables = BlockTables(self.block_pool, sliding_window=facts.sliding_window)
        self.eos_token_ids = frozenset(facts.eos_token_ids)
        self.max_num_tokens = most_tokens(facts)
        self.watermark_blocks = int(WATERMARK * facts.num_blocks) if has_cache else 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.requests: dict[str, Request] = {}
        self.preemptions_total = 0
        self.finished_total = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises: PromptTooLong, RequestError or QueueFull; then nothing of it is kept.
        """
        assert request.request_id not in self.requests, request.request_id
        verify_fits(request.prompt_token_ids, request.sampling_params, self.facts)
        verify_queue_has_room(
            len(self.requests),
            max_num_seqs=self.facts.max_num_seqs,
            max_num_waiting=self.config.max_num_waiting,
        )
        self.requests[request.request_id] = request
        self._enqueue(request.start(self._make_beams(request)))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks; ids that are not known have ended already."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                for sequence in list(request.sequences):
                    self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and free its blocks; with its last one the request ends."""
        self.leave(sequence)
        sequence.finish_reason = reason
        request = sequence.request
        request.sequences.remove(sequence)
        if not request.sequences:
            self.finished_total += 1
            del self.requests[request.request_id]

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A sequence in its parent's queue that shares all its blocks."""
        child = parent.fork(index)
        self.block_tables.share(child)
        if child.status is Status.RUNNING:
            self.running.append(child)
        else:
            self._enqueue(child)
        return child

    def leave(self, sequence: Sequence) -> None:
        """Out of its queue, without blocks, as a beam that did not survive."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self.block_tables.release(sequence)

    def schedule(self) -> SchedulerOutput:
        """Hand out the tokens of a step: count them as computed, its samples as known to come."""
        step = _Schedule(token_budget=self.facts.max_num_batched_tokens)
        self._schedule_running(step)
        # Admission after a preemption would take the blocks that were just made free.
        if not step.has_preempted:
            self._schedule_waiting(step)
        sequences = list(step.num_scheduled_tokens)
        rows = [
            make_row(sequence, num_tokens, block_size=self.block_pool.block_size)
            for sequence, num_tokens in step.num_scheduled_tokens.items()
        ]
        for number, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            sequence.num_computed_tokens += len(row.token_ids)
            if row.sampling_params is not None:
                sequence.num_in_flight += 1
                sequence.row_in_flight = number
        return SchedulerOutput(
            rows=rows,
            sequences=sequences,
            copies=[BlockCopy(source, target) for target, source in step.source_of.items()],
            admitted=step.admitted,
            num_scheduled_tokens=self.facts.max_num_batched_tokens - step.token_budget,
        )

    def check(self) -> None:
        """Assert that every block is accounted for."""
        sequences = [s for request in self.requests.values() for s in request.sequences]
        self.block_tables.check(sequences)
        assert len(sequences) == len(self.running) + len(self.waiting)
        assert all(not sequence.block_table for sequence in self.waiting)
        assert sum(s.num_slots for s in self.running) <= self.facts.max_num_seqs
        assert all(len(s.unit) <= self.facts.max_num_seqs for s in self.running)

    # Running sequences

    def _schedule_running(self, step: _Schedule) -> None:
        # Decoding sequences first: a long prompt must not delay anybody's next token.
        decoding = [s for s in self.running if s.num_pending_tokens <= 1]
        prefilling = [s for s in self.running if s.num_pending_tokens > 1]
        for sequence in decoding:
            unit = sequence.unit
            if sequence is not unit[0] or not self._can_step(unit, step):
                continue
            if all(self._make_room(member, step, 1) for member in unit):
                for member in unit:
                    step.take(member, 1)
        for sequence in prefilling:
            num_tokens = min(sequence.num_pending_tokens, self._prefill_budget(step, sequence))
            if num_tokens > 0 and self._make_room(sequence, step, num_tokens):
                step.take(sequence, num_tokens)

    def _can_step(self, unit: list[Sequence], step: _Schedule) -> bool:
        """Whether these decoding sequences can be in the step, before blocks are asked for."""
        if len(unit) > step.token_budget or unit[0].status is not Status.RUNNING:
            return False
        if unit[0].num_in_flight == 0:
            return True
        # The token in flight is computed next, unless it is known to be the last one.
        sequence = unit[0]
        return sequence.can_run_ahead and not (
            sequence.num_output_tokens == sequence.request.sampling_params.max_tokens
            or sequence.num_tokens >= self.max_num_tokens
        )

    def _prefill_budget(self, step: _Schedule, sequence: Sequence) -> int:
        """Prompt tokens of this sequence that the step can still take."""
        if step.num_decoding == 0:
            return step.token_budget
        num_prefilling = self.facts.max_num_batched_tokens - step.token_budget - step.num_decoding
        left = max(0, self.config.long_prefill_token_threshold - num_prefilling)
        depth = sequence.num_computed_tokens
        doubling_depth = self.facts.doubling_depth
        slowed = -(-left * doubling_depth // (doubling_depth + depth))
        if slowed < left:
            # Few sizes of steps: libraries prepare for each new one.
            slowed = max(slowed // _CHUNK_MULTIPLE, 1) * _CHUNK_MULTIPLE
        return min(step.token_budget, left, slowed)

    def _make_room(self, sequence: Sequence, step: _Schedule, num_tokens: int) -> bool:
        """Make room for num_tokens more, preempting others if need be.

        False: the sequence itself was preempted.
        """
        while sequence.status is Status.RUNNING:
            if self.block_tables.extend(sequence, num_tokens, step.source_of):
                return True
            self._preempt_one(step)
        return False

    def _preempt_one(self, step: _Schedule) -> None:
        """Preempt what loses least, the first in rank excepted; of equals the last."""
        first = min(self.running, key=_order)
        candidates = [s for s in self.running if s.unit[0] is not first.unit[0]]
        # Alone, a request always has room: verify_fits.
        assert candidates
        victim = min(
            candidates,
            key=lambda s: (s.num_computed_tokens, -s.request.rank, -s.request.arrival, -s.index),
        )
        for member in victim.unit:
            step.give_back(member)
        step.has_preempted = True
        self.preemptions_total += 1
        request = victim.request
        if request.beams is not None:
            for member in request.sequences:
                self.leave(member)
            self._enqueue(request.start(self._make_beams(request)))
            return
        self.leave(victim)
        self._enqueue(victim)

    # Waiting sequences

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_order)

    def _schedule_waiting(self, step: _Schedule) -> None:
        num_slots = sum(sequence.num_slots for sequence in self.running)
        while self.waiting:
            sequence = self.waiting[0]
            request = sequence.request
            if num_slots + sequence.num_slots > self.facts.max_num_seqs:
                break
            if self.facts.pooler is None:
                num_tokens = self._prefill_budget(step, sequence)
            else:
                num_tokens = _whole_text(step, sequence)
            # A sequence that was preempted knows all its tokens only when its step has run.
            if num_tokens == 0 or sequence.num_in_flight:
                break
            reserve = self.watermark_blocks if self.running else 0
            if not self.block_tables.admit(sequence, num_tokens, reserve, step.source_of):
                break
            self.waiting.pop(0)
            self.running.append(sequence)
            sequence.status = Status.RUNNING
            num_slots += sequence.num_slots
            if not request.was_admitted:
                request.was_admitted = True
                request.num_cached_tokens = sequence.num_computed_tokens
                self.prefix_cache_queries += sequence.num_tokens
                self.prefix_cache_hits += sequence.num_computed_tokens
                step.admitted.append(request)
            step.take(sequence, min(sequence.num_pending_tokens, num_tokens))

    # Both

    def _make_beams(self, request: Request) -> BeamSearch | None:
        params = request.sampling_params
        if not params.use_beam_search:
            return None
        num_left = self.max_num_tokens - request.num_prompt_tokens
        return BeamSearch(
            params,
            eos_token_ids=self.eos_token_ids,
            max_tokens=num_left if params.max_tokens is None else min(params.max_tokens, num_left),
        )


def _whole_text(step: _Schedule, sequence: Sequence) -> int:
    """All tokens of a text that is pooled over; 0: the step has no room for them. It has if there
    is nothing else in it: then it takes as long as it takes.
    """
    num_tokens = sequence.num_pending_tokens
    is_first = not step.num_scheduled_tokens
    return num_tokens if is_first or num_tokens <= step.token_budget else 0


def _order(sequence: Sequence) -> tuple[int, int, int]:
    request = sequence.request
    return request.rank, request.arrival, sequence.index
