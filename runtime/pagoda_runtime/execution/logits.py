"""Change rows' logits as their sampling parameters ask, before temperature and truncation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pagoda_kernels.cpu.mask_logits import mask_logits_cpu
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.sampling_params import SamplingParams

# Divided by the lowest temperature it is still in the range of fp32.
_LARGE = 1e30
# Of so many tokens one is allowed at most, or forbidden, where it is faster to look at these alone.
_FEW = 16


def params_of(row: ScheduledRow) -> SamplingParams:
    """The parameters of a row that samples."""
    assert row.sampling_params is not None
    return row.sampling_params


def is_processed(row: ScheduledRow) -> bool:
    """Whether process_logits would change the row's logits."""
    params = params_of(row)
    return (
        params.needs_history
        or params.grammar is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_words_token_ids)
        or bool(params.logit_bias)
        or row.num_output_tokens < params.min_tokens
    )


def is_plain(row: ScheduledRow) -> bool:
    """Whether the row takes the token of the largest logit as computed."""
    return params_of(row).is_greedy and not row.num_candidates and not is_processed(row)


def process_logits(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> torch.Tensor:
    """The rows' logits after, in this order: the grammar's mask, allowed_token_ids, bad_words,
    min_tokens, logit_bias, repetition penalty, frequency and presence penalties.

    Where bad_words and min_tokens would forbid every token that is allowed, they give way, as
    allowed_token_ids do to a grammar that allows none of them.

    Args:
        logits: [num_rows, vocab_size], any float dtype; left as it is.
        eos_token_ids: the model's end tokens, which min_tokens holds back.
    Returns: [num_rows, vocab_size] fp32, -inf for tokens that must not come.
    """
    processed = clean_logits(logits)
    if any(is_processed(row) for row in rows):
        changes = find_changes(rows, eos_token_ids, logits.shape[1])
        change_logits(processed, [torch.from_numpy(array) for array in changes])
    return processed


def clean_logits(logits: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 with numbers alone."""
    # A model that overflows on one request must not end the others.
    cleaned = logits.to(torch.float32, copy=True)
    return cleaned.nan_to_num_(nan=0.0, posinf=_LARGE, neginf=-_LARGE)


Array = npt.NDArray[Any]
_Entries = list[tuple[int, Collection[int], npt.ArrayLike]]
"""Rows, some of their tokens, and a number for each of these or one for all."""


def find_changes(
    rows: Sequence[ScheduledRow], eos_token_ids: Collection[int], vocab_size: int
) -> list[Array]:
    """What `change_logits` does to the rows: rows with masks, and these; rows that may have some
    tokens alone, and for these tokens, bias, repetition, presence and frequency the places in
    flattened logits, int64, each with numbers, fp32.
    """
    masked, masks = list[int](), list[Array]()
    allowed, added, repeated, present, frequent = entries = [_Entries() for _ in range(5)]
    for index, row in enumerate(rows):
        params, said = params_of(row), row.history or []
        output, some = said[row.num_prompt_tokens :], params.allowed_token_ids
        forbidden = _forbidden_token_ids(row, eos_token_ids)
        if row.mask is not None:
            masked.append(index)
            masks.append(_narrow(row.mask, some, forbidden))
        else:
            if some is not None:
                allowed.append((index, some, 0.0))
            if forbidden and not forbidden.issuperset(range(vocab_size) if some is None else some):
                added.append((index, forbidden, -np.inf))
        if params.logit_bias:
            added.append((index, params.logit_bias, list(params.logit_bias.values())))
        if params.repetition_penalty != 1.0:
            repeated.append((index, said, params.repetition_penalty))
        if params.presence_penalty:
            present.append((index, output, params.presence_penalty))
        if params.frequency_penalty:
            frequent.append((index, output, -params.frequency_penalty))
    return [
        np.array(masked, np.int64),
        np.stack(masks) if masks else np.empty((0, 0), np.uint8),
        np.array([index for index, *_ in allowed], np.int64),
        *(array for some in entries for array in _locate(some, vocab_size)),
    ]


def change_logits(logits: torch.Tensor, changes: Sequence[torch.Tensor]) -> None:
    """Change cleaned logits in place. Costs a few operations on the changed ones alone.

    Args:
        logits: [num_rows, vocab_size] fp32.
        changes: of `find_changes`, on the device of logits.
    Sources: Keskar et al., CTRL, 2019 (repetition penalty); OpenAI's API reference (the others).
    """
    masked, masks, restricted, allowed, _, added, biases, repeated, factors, *penalties = changes
    present, presences, frequent, frequencies = penalties
    if masked.numel():
        _apply_masks(logits, masked, masks)
    flat = logits.view(-1)
    if restricted.numel():
        values = flat[allowed]
        logits.index_fill_(0, restricted, -torch.inf)
        flat[allowed] = values
    if added.numel():
        flat.index_add_(0, added, biases)
    # A token that occurs again is written again, with the same value.
    if repeated.numel():
        values = flat[repeated]
        flat[repeated] = torch.where(values > 0, values / factors, values * factors)
    if present.numel():
        flat[present] -= presences
    if frequent.numel():
        flat.index_add_(0, frequent, frequencies)


def _apply_masks(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set logits of tokens whose bits are 0 to -inf, in place.

    Args:
        rows: [num_masked] int64, the rows that the masks are of.
        masks: [num_masked, num_bytes] uint8, as `ScheduledRow.mask`.
    """
    if logits.device.type == "cpu":
        sizes = len(rows), logits.shape[1], masks.shape[1]
        mask_logits_cpu(logits, rows, masks.contiguous(), *sizes)
        return
    added = added_by_bits(masks).flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.add_(added)
    else:
        logits.index_add_(0, rows, added)


def added_by_bits(masks: torch.Tensor) -> torch.Tensor:
    """[num_masked, num_bytes, 8] fp32: what masks add to the logits of their tokens."""
    bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return torch.where((masks[:, :, None] >> bits) & 1 == 1, 0.0, -torch.inf)


class Few(NamedTuple):
    """Few tokens that are the only ones allowed, or the only ones that are not."""

    token_ids: torch.Tensor
    """[num_tokens] int64, ascending."""
    are_allowed: bool


def find_few(row: ScheduledRow, eos_token_ids: Collection[int], vocab_size: int) -> Few | None:
    """What a row's mask comes to, where that are few tokens, and nothing else changes logits."""
    params, mask = params_of(row), row.mask
    if mask is None or params.needs_history or params.logit_bias or row.num_candidates:
        return None
    forbidden = _forbidden_token_ids(row, eos_token_ids)
    if forbidden or params.allowed_token_ids is not None:
        mask = _narrow(mask, params.allowed_token_ids, forbidden).tobytes()
    return _few_of(mask, vocab_size)


# Within a string of JSON most steps have the same mask, as all requests for such have.
@lru_cache(64)
def _few_of(mask: bytes, vocab_size: int) -> Few | None:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
    is_allowed = bits.view(np.bool_)
    num_allowed, most = np.count_nonzero(is_allowed), vocab_size // _FEW
    if 0 < num_allowed <= most:
        return Few(torch.from_numpy(np.flatnonzero(is_allowed)), are_allowed=True)
    if vocab_size - num_allowed <= most:
        return Few(torch.from_numpy(np.flatnonzero(~is_allowed)), are_allowed=False)
    return None


def _narrow(mask: bytes, allowed: Collection[int] | None, forbidden: Collection[int]) -> Array:
    """[num_bytes] uint8: a mask, without the tokens that are not allowed if any of it is left then,
    and without those that are forbidden likewise.
    """
    narrowed = np.frombuffer(mask, np.uint8)
    for token_ids, inverted in ((allowed, 0x00), (forbidden or None, 0xFF)):
        if token_ids is not None:
            some = np.fromiter(token_ids, np.int64, len(token_ids))
            bits = np.zeros_like(narrowed)
            np.bitwise_or.at(bits, some // 8, np.left_shift(1, some % 8).astype(np.uint8))
            both = narrowed & (bits ^ np.uint8(inverted))
            narrowed = both if both.any() else narrowed
    return narrowed


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


def _locate(entries: _Entries, vocab_size: int) -> tuple[Array, Array]:
    """The entries' places in flattened logits, and their numbers."""
    if not entries:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    places, numbers = list[Array](), list[Array]()
    for row, token_ids, amounts in entries:
        some = np.fromiter(token_ids, np.int64, len(token_ids)) + row * vocab_size
        places.append(some)
        numbers.append(np.full(some.shape, amounts, np.float32))
    return np.concatenate(places), np.concatenate(numbers)
