"""Attention of single query tokens that goes along the cache and gathers nothing.

Every thread takes one key head of one row after the other: see `pagoda_kernels.cpu.threads`. Keys
and values are read once, where they lie; gathering them for products of matrices reads and writes
them three times. A row's sums are made in the order of its keys, whatever the other rows are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.sequences import Sequences
from pagoda_kernels.cpu.compiled import LOG2_E, Array, address_of, compiled, exp2, prefetch, row_of
from pagoda_kernels.cpu.formats import (
    KV_DTYPES,
    UNITS,
    VIEWS,
    floats,
    int64s,
    is_common,
    narrow,
    widen,
    widened,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader
from pagoda_kernels.kv_cache import LARGEST

# Keys asked for ahead of the one in use: memory answers after the time of about four.
_AHEAD = 6


class DecodeRow(NamedTuple):
    """A query token, and the slots of the keys that it sees."""

    token: int
    """Of the step."""
    first_slot: int
    last_slot: int
    """Slots first_slot … last_slot - 1 of the plan's."""


class DecodePlan(NamedTuple):
    """Query tokens of a step that are attended to one by one."""

    slots: torch.Tensor
    """[num_slots] int64: cache slots of each sequence, oldest first."""
    rows: torch.Tensor
    """[num_rows, fields of DecodeRow] int64; those that see most keys are begun first."""


def plan_decode(sequences: Sequences, seqs: np.ndarray, window: int) -> DecodePlan:
    """All query tokens of some sequences; window: 0 for none."""
    query_lens, visible = sequences.query_lens[seqs], sequences.num_visible(seqs, window)
    ends = np.cumsum(visible)
    seq_of = np.repeat(np.arange(len(seqs)), query_lens)
    offsets = np.arange(len(seq_of)) - (np.cumsum(query_lens) - query_lens)[seq_of]
    firsts, lasts = (ends - visible)[seq_of], (ends - query_lens)[seq_of] + offsets + 1
    if window:
        firsts = np.maximum(firsts, lasts - window)
    rows = np.stack((sequences.starts[seqs][seq_of] + offsets, firsts, lasts), axis=1)
    rows = rows[np.argsort(firsts - lasts, kind="stable")]
    return DecodePlan(sequences.newest_slots(seqs, visible), torch.from_numpy(rows))


class DecodeArguments(NamedTuple):
    """Addresses and numbers. q's tokens are q_stride numbers apart, out's are not apart."""

    q: int
    q_stride: int
    kv_cache: int
    scales: int
    """0 where the dtype of keys and values has none."""
    num_slots: int
    slots: int
    num_keys: int
    rows: int
    num_rows: int
    out: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


_arguments, _row = make_reader(DecodeArguments), make_reader(DecodeRow)
_ROW_BYTES = 8 * len(DecodeRow._fields)


def _make_kernel(dtype: torch.dtype, kv_dtype: torch.dtype) -> ThreadedKernel:
    view, num_bytes, kv_view = VIEWS[dtype], dtype.itemsize, VIEWS[kv_dtype]
    is_scaled, unit = kv_dtype in LARGEST, np.float32(UNITS.get(kv_dtype, 1.0))

    def decode(task: Task) -> None:
        """A part is a key head of a row."""
        a = _arguments(task)
        slots = int64s(a.slots, (a.num_keys,))
        # A head's key or value in each row: of each slot all keys, then all values.
        stride = 2 * a.num_kv_heads
        cache = kv_view(a.kv_cache, (a.num_slots * stride, a.head_dim))
        scales = floats(a.scales, (a.num_slots * stride,)) if is_scaled else None
        group = a.num_heads // a.num_kv_heads
        queries = np.empty((group, a.head_dim), np.float32)
        sums = np.empty((group, a.head_dim), np.float32)
        part = claim(task)
        while part < a.num_rows * a.num_kv_heads:
            row, head = _row(a.rows + part // a.num_kv_heads * _ROW_BYTES), part % a.num_kv_heads
            seen = slots[row.first_slot : row.last_slot]
            scores = np.empty((group, seen.size), np.float32)
            offset = head * group * a.head_dim
            q = view(a.q + num_bytes * (row.token * a.q_stride + offset), (group, a.head_dim))
            for i in range(group):
                widen(q[i], queries[i])
            _score(queries, cache, scales, unit, stride, head, seen, scores)
            for i in range(group):
                _softmax(scores[i], np.float32(a.scale))
            first = a.num_kv_heads + head
            _weigh(scores, cache, scales, unit, stride, first, seen, sums)
            at = row.token * a.num_heads * a.head_dim + offset
            out = view(a.out + num_bytes * at, (group, a.head_dim))
            for i in range(group):
                narrow(sums[i], out[i])
            part = claim(task)

    variant = f"{dtype} {kv_dtype}"
    return ThreadedKernel(decode, variant=variant, is_ahead=is_common(dtype, kv_dtype))


DECODE = {dtypes: _make_kernel(*dtypes) for dtypes in KV_DTYPES}
"""The kernel for each dtype and that of its keys and values; called with DecodeArguments."""


@compiled
def _ask_for(cache: Array, scales: Any, row: int) -> None:
    numbers = row_of(cache, row)
    prefetch(address_of(numbers), numbers.size * numbers.itemsize)
    if scales is not None:
        prefetch(address_of(scales) + 4 * row, 4)


@compiled
def _scale_of(scales: Any, unit: Any, row: int) -> Any:
    """What a row of the cache is to be multiplied by."""
    return np.float32(1) if scales is None else scales[row] * unit


@compiled
def _score(
    queries: Array,
    cache: Array,
    scales: Any,
    unit: Any,
    stride: int,
    head: int,
    slots: Array,
    scores: Array,
) -> None:
    """scores[query, key] = query · key"""
    group = len(queries)
    for index in range(slots.size):
        if index + _AHEAD < slots.size:
            _ask_for(cache, scales, slots[index + _AHEAD] * stride + head)
        row = slots[index] * stride + head
        key, scale = row_of(cache, row), _scale_of(scales, unit, row)
        first = 0
        while first + 4 <= group:
            _score_four(queries[first : first + 4], key, scale, scores[first : first + 4, index])
            first += 4
        for i in range(first, group):
            scores[i, index] = _score_one(queries[i], key) * scale


@compiled
def _score_four(queries: Array, key: Array, scale: Any, scores: Array) -> None:
    """Four at once, because widening the key takes as long as one of them."""
    a = b = c = d = np.float32(0)
    for i in range(key.size):
        number = widened(key[i])
        a += queries[0, i] * number
        b += queries[1, i] * number
        c += queries[2, i] * number
        d += queries[3, i] * number
    scores[0], scores[1], scores[2], scores[3] = a * scale, b * scale, c * scale, d * scale


@compiled
def _score_one(query: Array, key: Array) -> Any:
    total = np.float32(0)
    for i in range(key.size):
        total += query[i] * widened(key[i])
    return total


@compiled
def _softmax(scores: Array, scale: Any) -> None:
    """exp(scale * scores), divided by its sum; in place."""
    largest = scores[0]
    for i in range(scores.size):
        largest = max(largest, scores[i])
    total = np.float32(0)
    for i in range(scores.size):
        scores[i] = exp2((scores[i] - largest) * scale * LOG2_E)
        total += scores[i]
    for i in range(scores.size):
        scores[i] /= total


@compiled
def _weigh(
    weights: Array,
    cache: Array,
    scales: Any,
    unit: Any,
    stride: int,
    head: int,
    slots: Array,
    sums: Array,
) -> None:
    """sums[query] = sum over keys of weights[query, key] * value"""
    group, head_dim = sums.shape
    for i in range(group):
        for j in range(head_dim):
            sums[i, j] = np.float32(0)
    for index in range(0, slots.size - 1, 2):
        for ahead in range(index + _AHEAD, min(index + _AHEAD + 2, slots.size)):
            _ask_for(cache, scales, slots[ahead] * stride + head)
        row, next_row = slots[index] * stride + head, slots[index + 1] * stride + head
        value, next_value = row_of(cache, row), row_of(cache, next_row)
        scale, next_scale = _scale_of(scales, unit, row), _scale_of(scales, unit, next_row)
        for i in range(group):
            weights[i, index] *= scale
            weights[i, index + 1] *= next_scale
        first = 0
        while first + 2 <= group:
            some = weights[first : first + 2, index : index + 2]
            _weigh_two(some, value, next_value, sums[first : first + 2])
            first += 2
        if first < group:
            _weigh_one(weights[first, index], value, sums[first])
            _weigh_one(weights[first, index + 1], next_value, sums[first])
    if slots.size % 2:
        row = slots[slots.size - 1] * stride + head
        value, scale = row_of(cache, row), _scale_of(scales, unit, row)
        for i in range(group):
            _weigh_one(weights[i, slots.size - 1] * scale, value, sums[i])


@compiled
def _weigh_two(weights: Array, value: Array, next_value: Array, sums: Array) -> None:
    """Two values for two queries: sums are read and written half as often."""
    a, b, c, d = weights[0, 0], weights[0, 1], weights[1, 0], weights[1, 1]
    for i in range(value.size):
        number, next_number = widened(value[i]), widened(next_value[i])
        sums[0, i] += a * number + b * next_number
        sums[1, i] += c * number + d * next_number


@compiled
def _weigh_one(weight: Any, value: Array, sums: Array) -> None:
    for i in range(value.size):
        sums[i] += weight * widened(value[i])
