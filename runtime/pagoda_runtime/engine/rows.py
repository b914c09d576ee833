"""The row of a step that a sequence stands in."""

from __future__ import annotations

from pagoda_runtime.engine.request import Sequence, seed_of_choice
from pagoda_runtime.ipc.messages import PLACEHOLDER_TOKEN_ID, ScheduledRow


def make_row(sequence: Sequence, num_tokens: int, *, block_size: int) -> ScheduledRow:
    """The next num_tokens tokens of a sequence, whose table has blocks for them."""
    request = sequence.request
    params = request.sampling_params
    start = sequence.num_computed_tokens
    end = start + num_tokens
    num_blocks = -(-end // block_size)
    table = sequence.block_table
    token_ids = sequence.token_ids[start:end]
    row_in_flight = None
    if len(token_ids) < num_tokens:
        token_ids.append(PLACEHOLDER_TOKEN_ID)
        row_in_flight = sequence.row_in_flight
    is_sampled = end == sequence.num_tokens
    beams = request.beams
    num_draws = 1 if request.is_forked or beams is not None else params.num_sequences
    targets = None
    if params.prompt_logprobs is not None and start < request.num_prompt_tokens:
        targets = request.prompt_token_ids[start + 1 : end + 1]
    return ScheduledRow(
        request_id=request.request_id,
        index=sequence.index,
        token_ids=token_ids,
        row_in_flight=row_in_flight,
        start=start,
        # Copied only for the chunks of a long prompt; a decode step copies nothing.
        block_table=table if num_blocks == len(table) else table[:num_blocks],
        sampling_params=params if is_sampled else None,
        seeds=(
            sequence.seed,
            *(seed_of_choice(request.seed, index) for index in range(1, num_draws)),
        ),
        num_candidates=beams.num_candidates if beams is not None else 0,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=sequence.num_output_tokens,
        history=list(sequence.token_ids) if is_sampled and params.needs_history else None,
        prompt_targets=targets,
        num_prompt_logprobs=params.prompt_logprobs or 0,
        second_text_start=request.second_text_start,
    )
