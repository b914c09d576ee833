"""Change a row's logits as its sampling parameters ask, before temperature and truncation."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch

from pagoda_runtime.ipc.messages import ScheduledRow

# Divided by the lowest temperature it is still in the range of fp32.
_LARGE = 1e30


def is_processed(row: ScheduledRow) -> bool:
    """Whether process_logits would change the row's logits."""
    params = row.sampling_params
    assert params is not None
    return (
        params.needs_history
        or params.allowed_token_ids is not None
        or bool(params.bad_words_token_ids)
        or bool(params.logit_bias)
        or row.num_output_tokens < params.min_tokens
    )


def process_logits(
    logits: torch.Tensor, row: ScheduledRow, eos_token_ids: Collection[int]
) -> torch.Tensor:
    """The row's logits after, in this order: allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition penalty, frequency and presence penalties.

    Where bad_words and min_tokens would forbid every token that is allowed, they give way.

    Args:
        logits: [vocab_size], any float dtype; left as it is.
        eos_token_ids: the model's end tokens, which min_tokens holds back.
    Returns: [vocab_size] fp32, -inf for tokens that must not come.
    """
    params = row.sampling_params
    assert params is not None
    processed = logits.float()
    if not math.isfinite(float(processed.amax())):
        # A model that overflows on one request must not end the others.
        processed = processed.nan_to_num(nan=0.0, posinf=_LARGE, neginf=-_LARGE)
    if not is_processed(row):
        return processed
    if processed is logits:
        processed = processed.clone()
    allowed, forbidden = params.allowed_token_ids, _forbidden_token_ids(row, eos_token_ids)
    if allowed is not None:
        ids = _tensor(allowed, logits.device)
        processed = torch.full_like(processed, -torch.inf).index_copy_(0, ids, processed[ids])
    if forbidden and not forbidden.issuperset(
        range(len(processed)) if allowed is None else allowed
    ):
        processed.index_fill_(0, _tensor(forbidden, logits.device), -torch.inf)
    if params.logit_bias:
        ids = _tensor(params.logit_bias, logits.device)
        processed[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    _penalize(processed, row)
    return processed


def _forbidden_token_ids(row: ScheduledRow, eos_token_ids: Collection[int]) -> set[int]:
    """Tokens that would complete a bad word, and those that end a row of too few tokens."""
    params = row.sampling_params
    assert params is not None
    forbidden = set()
    for *prefix, last in params.bad_words_token_ids:
        if not prefix or (row.history or [])[-len(prefix) :] == prefix:
            forbidden.add(last)
    if row.num_output_tokens < params.min_tokens:
        forbidden.update(eos_token_ids, params.stop_token_ids)
    return forbidden


def _penalize(logits: torch.Tensor, row: ScheduledRow) -> None:
    """Penalize, in place, tokens of the row's history. Costs a few operations on the history alone.

    Sources: Keskar et al., CTRL, 2019 (repetition penalty); OpenAI's API reference (the others).
    """
    params = row.sampling_params
    assert params is not None
    repetition = params.repetition_penalty
    frequency, presence = params.frequency_penalty, params.presence_penalty
    if repetition == 1.0 and not frequency and not presence:
        return
    assert row.history is not None
    said = _tensor(row.history, logits.device)
    output = said[row.num_prompt_tokens :]
    # A token that occurs again is written again, with the same value.
    if repetition != 1.0:
        values = logits[said]
        logits[said] = torch.where(values > 0, values / repetition, values * repetition)
    if presence:
        logits[output] = logits[output] - presence
    if frequency:
        logits.index_add_(0, output, logits.new_full((len(output),), -frequency))


def _tensor(token_ids: Collection[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(token_ids, np.int64, len(token_ids))).to(device)
