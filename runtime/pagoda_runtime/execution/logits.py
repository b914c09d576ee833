"""Change rows' logits as their sampling parameters ask, before temperature and truncation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.sampling_params import SamplingParams

# Divided by the lowest temperature it is still in the range of fp32.
_LARGE = 1e30


def params_of(row: ScheduledRow) -> SamplingParams:
    """The parameters of a row that samples."""
    assert row.sampling_params is not None
    return row.sampling_params


def is_processed(row: ScheduledRow) -> bool:
    """Whether process_logits would change the row's logits."""
    params = params_of(row)
    return (
        params.needs_history
        or params.allowed_token_ids is not None
        or bool(params.bad_words_token_ids)
        or bool(params.logit_bias)
        or row.num_output_tokens < params.min_tokens
    )


def process_logits(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> torch.Tensor:
    """The rows' logits after, in this order: allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition penalty, frequency and presence penalties.

    Where bad_words and min_tokens would forbid every token that is allowed, they give way.

    Args:
        logits: [num_rows, vocab_size], any float dtype; left as it is.
        eos_token_ids: the model's end tokens, which min_tokens holds back.
    Returns: [num_rows, vocab_size] fp32, -inf for tokens that must not come.
    """
    processed = logits.to(torch.float32, copy=True)
    # A model that overflows on one request must not end the others.
    processed.nan_to_num_(nan=0.0, posinf=_LARGE, neginf=-_LARGE)
    if any(is_processed(row) for row in rows):
        _restrict(processed, rows, eos_token_ids)
        _penalize(processed, rows)
    return processed


_Entries = list[tuple[int, Collection[int], npt.ArrayLike]]
"""Rows, some of their tokens, and a number for each of these or one for all."""


def _restrict(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> None:
    """Forbid tokens and add biases, in place."""
    allowed, added = _Entries(), _Entries()
    for index, row in enumerate(rows):
        params = params_of(row)
        if params.allowed_token_ids is not None:
            allowed.append((index, params.allowed_token_ids, 0.0))
        forbidden = _forbidden_token_ids(row, eos_token_ids)
        possible = params.allowed_token_ids or range(logits.shape[1])
        if forbidden and not forbidden.issuperset(possible):
            added.append((index, forbidden, -np.inf))
        if params.logit_bias:
            added.append((index, params.logit_bias, list(params.logit_bias.values())))
    flat = logits.view(-1)
    if allowed:
        places, _ = _locate(allowed, logits)
        values = flat[places]
        logits[[index for index, *_ in allowed]] = -torch.inf
        flat[places] = values
    if added:
        flat.index_add_(0, *_locate(added, logits))


def _forbidden_token_ids(row: ScheduledRow, eos_token_ids: Collection[int]) -> set[int]:
    """Tokens that would complete a bad word, and those that end a row of too few tokens."""
    params = params_of(row)
    forbidden = set()
    for *prefix, last in params.bad_words_token_ids:
        if not prefix or (row.history or [])[-len(prefix) :] == prefix:
            forbidden.add(last)
    if row.num_output_tokens < params.min_tokens:
        forbidden.update(eos_token_ids, params.stop_token_ids)
    return forbidden


def _penalize(logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> None:
    """Penalize, in place, tokens of the rows' histories. Costs a few operations on these alone.

    Sources: Keskar et al., CTRL, 2019 (repetition penalty); OpenAI's API reference (the others).
    """
    repeated, present, frequent = _Entries(), _Entries(), _Entries()
    for index, row in enumerate(rows):
        params, said = params_of(row), row.history or []
        output = said[row.num_prompt_tokens :]
        if params.repetition_penalty != 1.0:
            repeated.append((index, said, params.repetition_penalty))
        if params.presence_penalty:
            present.append((index, output, params.presence_penalty))
        if params.frequency_penalty:
            frequent.append((index, output, -params.frequency_penalty))
    flat = logits.view(-1)
    # A token that occurs again is written again, with the same value.
    if repeated:
        places, amounts = _locate(repeated, logits)
        values = flat[places]
        flat[places] = torch.where(values > 0, values / amounts, values * amounts)
    if present:
        places, amounts = _locate(present, logits)
        flat[places] -= amounts
    if frequent:
        flat.index_add_(0, *_locate(frequent, logits))


def _locate(entries: _Entries, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries' places in flattened logits, int64, and their numbers, fp32."""
    places, numbers = [], []
    for row, token_ids, amounts in entries:
        some = np.fromiter(token_ids, np.int64, len(token_ids)) + row * logits.shape[1]
        places.append(some)
        numbers.append(np.full(some.shape, amounts, np.float32))
    both = torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(numbers))
    return both[0].to(logits.device), both[1].to(logits.device)
