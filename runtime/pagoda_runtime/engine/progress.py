"""What a step's outputs do to the sequences: new tokens, forks, beams, ends."""

from __future__ import annotations

from collections.abc import Sequence as Several

import msgspec

from pagoda_runtime.engine.beam import Continuation
from pagoda_runtime.engine.request import Request, Sequence, Status
from pagoda_runtime.engine.scheduler import Scheduler, SchedulerOutput
from pagoda_runtime.ipc.messages import RequestDelta, RowOutput, ScheduledRow

Deltas = list[tuple[Request, RequestDelta]]


def advance(
    scheduler: Scheduler, scheduled: SchedulerOutput, outputs: Several[RowOutput]
) -> Deltas:
    """Take over the outputs of a step, one for each row, in order; the new tokens of each choice.

    Sequences that ended since the step was scheduled are passed over; those that were preempted
    keep what it sampled for them.
    """
    deltas: Deltas = []
    beams: dict[Request, list[tuple[Sequence, RowOutput]]] = {}
    for row, sequence, output in zip(scheduled.rows, scheduled.sequences, outputs, strict=True):
        if sequence.status is Status.FINISHED:
            continue
        _take_prompt_logprobs(sequence, row, output)
        if row.sampling_params is not None:
            sequence.num_in_flight -= 1
        if sequence.status is Status.RUNNING:
            scheduler.block_tables.prefix_cache.register_blocks(
                sequence, row.start + len(row.token_ids)
            )
        if row.sampling_params is None:
            continue
        if output.pooled is not None:
            deltas.append(_take_pooled(scheduler, sequence, output.pooled))
        elif sequence.request.beams is not None:
            beams.setdefault(sequence.request, []).append((sequence, output))
        else:
            deltas += _take_samples(scheduler, sequence, output)
    for request, members in beams.items():
        deltas += _advance_beams(scheduler, request, members)
    return deltas


def _take_prompt_logprobs(sequence: Sequence, row: ScheduledRow, output: RowOutput) -> None:
    found = output.prompt_logprobs
    if found is not None:
        # By place: a prompt that was preempted is computed again.
        sequence.request.prompt_logprobs[row.start : row.start + len(found)] = found


def _take_pooled(
    scheduler: Scheduler, sequence: Sequence, pooled: bytes
) -> tuple[Request, RequestDelta]:
    """The request's whole answer."""
    request = sequence.request
    scheduler.finish(sequence, "stop")
    return request, RequestDelta(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason="stop",
        queue_seconds=request.queue_seconds,
        pooled=pooled,
    )


def _take_samples(scheduler: Scheduler, sequence: Sequence, output: RowOutput) -> Deltas:
    """The sampled token; if there are several, forks of the sequence take the others."""
    request = sequence.request
    takers = [sequence]
    if not request.is_forked:
        takers += [scheduler.fork(sequence, i) for i in range(1, len(output.token_ids))]
        request.sequences = list(takers)
        request.is_forked = True
    deltas = []
    for number, taker in enumerate(takers):
        taker.token_ids.append(output.token_ids[number])
        if output.token_logprobs is not None:
            taker.cumulative_logprob += output.token_logprobs[number]
        num_output_tokens = len(taker.token_ids) - request.num_prompt_tokens
        _follow_grammar(scheduler, taker)
        _finish_if_ended(scheduler, taker, num_output_tokens)
        delta = RequestDelta(
            request_id=request.request_id,
            index=taker.index,
            new_token_ids=[output.token_ids[number]],
            logprobs=None if output.logprobs is None else [output.logprobs[number]],
            cumulative_logprob=None if output.token_logprobs is None else taker.cumulative_logprob,
            finish_reason=taker.finish_reason,
            stop_reason=taker.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            # Nothing else ends a sequence so here.
            error=taker.matcher.error
            if taker.matcher is not None and taker.finish_reason == "abort"
            else None,
        )
        deltas.append((request, _begin(request, delta) if num_output_tokens == 1 else delta))
    return deltas


def _begin(request: Request, delta: RequestDelta) -> RequestDelta:
    """The first delta of a choice; that of choice 0 tells what there is once for the request."""
    if delta.index != 0:
        return delta
    has_prompt_logprobs = request.sampling_params.prompt_logprobs is not None
    return msgspec.structs.replace(
        delta,
        prompt_logprobs=request.prompt_logprobs if has_prompt_logprobs else None,
        queue_seconds=request.queue_seconds,
    )


def _follow_grammar(scheduler: Scheduler, sequence: Sequence) -> None:
    """Take its last token, unless it is the end."""
    if sequence.matcher is not None and not _is_end(scheduler, sequence):
        sequence.matcher.take(sequence.token_ids[-1])


def _is_end(scheduler: Scheduler, sequence: Sequence) -> bool:
    """Whether the last token is one at which the model ends."""
    ignores = sequence.request.sampling_params.ignore_eos
    return not ignores and sequence.token_ids[-1] in scheduler.eos_token_ids


def _finish_if_ended(scheduler: Scheduler, sequence: Sequence, num_output_tokens: int) -> None:
    """End the sequence if its last known token is its last."""
    params, token_id = sequence.request.sampling_params, sequence.token_ids[-1]
    matcher = sequence.matcher
    if matcher is not None and matcher.error is not None:
        scheduler.finish(sequence, "abort")
    elif token_id in params.stop_token_ids:
        sequence.stop_reason = token_id
        scheduler.finish(sequence, "stop")
    elif _is_end(scheduler, sequence) or (matcher is not None and matcher.is_finished):
        scheduler.finish(sequence, "stop")
    elif (
        num_output_tokens == params.max_tokens
        or len(sequence.token_ids) >= scheduler.max_num_tokens
    ):
        scheduler.finish(sequence, "length")


def _advance_beams(
    scheduler: Scheduler, request: Request, members: list[tuple[Sequence, RowOutput]]
) -> Deltas:
    beams = request.beams
    assert beams is not None
    assert [sequence for sequence, _ in members] == request.sequences
    continuations = beams.advance(
        [sequence.known_output for sequence, _ in members],
        [sequence.cumulative_logprob for sequence, _ in members],
        [
            list(zip(output.token_ids, output.token_logprobs or [], strict=True))
            for _, output in members
        ],
    )
    request.is_forked = True
    if not beams.is_done:
        _replace_beams(scheduler, request, continuations)
        return []
    hypotheses = beams.finished[: request.sampling_params.n]
    for sequence in list(request.sequences):
        scheduler.finish(sequence, "stop")
    deltas = [
        RequestDelta(
            request_id=request.request_id,
            index=index,
            new_token_ids=hypothesis.token_ids,
            cumulative_logprob=hypothesis.cumulative_logprob,
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
        )
        for index, hypothesis in enumerate(hypotheses)
    ]
    return [(request, _begin(request, delta)) for delta in deltas]


def _replace_beams(
    scheduler: Scheduler, request: Request, continuations: Several[Continuation]
) -> None:
    """Each beam goes on as its first continuation; the others fork off; without one it is gone."""
    old = request.sequences
    taken: dict[int, Sequence] = {}
    new: list[Sequence] = []
    for continuation in continuations:
        parent = old[continuation.parent]
        if continuation.parent in taken:
            new.append(scheduler.fork(parent, parent.index))
        else:
            taken[continuation.parent] = parent
            new.append(parent)
    for number, sequence in enumerate(old):
        if number not in taken:
            scheduler.leave(sequence)
    request.sequences = new
    for index, (sequence, continuation) in enumerate(zip(new, continuations, strict=True)):
        sequence.index = index
        sequence.token_ids.append(continuation.token_id)
        sequence.cumulative_logprob = continuation.cumulative_logprob
