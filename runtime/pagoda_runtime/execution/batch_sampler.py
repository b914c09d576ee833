"""Choose the tokens of all rows of a step together, on a device that nobody waits for meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.sampling import Draw, draw_tokens, make_state, pack_draws
from pagoda_kernels.transfer import all_to_device
from pagoda_runtime.execution.logits import (
    change_logits,
    clean_logits,
    find_changes,
    is_processed,
    params_of,
)
from pagoda_runtime.execution.logprobs import (
    ToHost,
    describe_tokens,
    find_candidates,
    tell_candidates,
    tell_row,
)
from pagoda_runtime.ipc.messages import RowOutput, ScheduledRow


class Batch(NamedTuple):
    """Rows whose tokens a device may still be computing."""

    rows: Sequence[ScheduledRow]
    has_scores: bool
    token_ids: torch.Tensor
    """[num_rows] int64, on the device: each row's first token; for a beam any token."""
    on_host: ToHost

    def tell(self) -> list[RowOutput]:
        """Wait for the device; one output per row."""
        ((numbers, *others),) = self.on_host.wait()
        token_ids = numbers.astype(np.int64).tolist()
        described, candidates = (others[:4], others[4:]) if self.has_scores else ([], others)
        outputs, first, first_scored, beam = [], 0, 0, 0
        for row in self.rows:
            end, params = first + len(row.seeds), params_of(row)
            if row.num_candidates:
                outputs.append(tell_candidates(row, *(column[beam] for column in candidates)))
                beam += 1
            elif params.needs_logprobs:
                end_scored = first_scored + len(row.seeds)
                scores = [column[first_scored:end_scored] for column in described]
                outputs.append(tell_row(token_ids[first:end], scores, params))
                first_scored = end_scored
            else:
                outputs.append(RowOutput(token_ids=token_ids[first:end]))
            first = end
        return outputs


def _find_places(
    rows: Sequence[ScheduledRow],
) -> tuple[list[Draw], list[int], list[int], list[int]]:
    """A draw for each seed of each row; the rows' first draws, the draws whose logprobs are wanted,
    and the rows that are beams.
    """
    draws, firsts, scored, beams = list[Draw](), list[int](), list[int](), list[int]()
    for index, row in enumerate(rows):
        params, first = params_of(row), len(draws)
        firsts.append(first)
        if row.num_candidates:
            beams.append(index)
        elif params.needs_logprobs:
            scored.extend(range(first, first + len(row.seeds)))
        if row.num_candidates or params.is_greedy:
            draws.extend([Draw(index)] * len(row.seeds))
            continue
        position = row.start + len(row.token_ids)
        limits = (params.temperature, params.min_p, params.top_p)
        draws.extend(
            Draw(index, params.top_k, make_state(seed, position), *limits) for seed in row.seeds
        )
    return draws, firsts, scored, beams


def start_batch(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> Batch:
    """Begin to choose tokens as `sampler.sample` does, unless a sum is rounded to the other side of
    what is drawn: one transfer to the device, and one from it, which waits for nothing later.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
    """
    all_draws, *places = _find_places(rows)
    arrays = [pack_draws(all_draws), *(np.array(some, np.int64) for some in places)]
    if any(is_processed(row) for row in rows):
        arrays += find_changes(rows, eos_token_ids, logits.shape[1])
    draws, firsts, scored, beams, *changes = all_to_device(arrays, logits.device)
    processed = logits
    if changes:
        processed = clean_logits(logits)
        change_logits(processed, changes)
    tokens = draw_tokens(processed, draws)
    found, has_scores = [tokens], len(scored) > 0
    if has_scores:
        found += describe_tokens(
            logits.index_select(0, draws[0].index_select(0, scored)),
            tokens.index_select(0, scored),
            max(params_of(row).logprobs or 0 for row in rows),
        )
    if len(beams):
        most, some = max(row.num_candidates for row in rows), processed.index_select(0, beams)
        found += find_candidates(some if changes else clean_logits(some), most)
    return Batch(rows, has_scores, tokens.index_select(0, firsts), ToHost([found]))
