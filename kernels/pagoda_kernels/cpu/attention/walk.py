"""Attention of single query tokens that walks along the cache and gathers nothing.

Every thread takes one key head of one sequence after the other: see `pagoda_kernels.cpu.threads`.
Keys and values are read once, where they lie; gathering them for products of matrices reads and
writes them three times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagoda_kernels.cpu.attention.slots import require_slots
from pagoda_kernels.cpu.compiled import (
    LOG2_E,
    Array,
    bf16_bits,
    compiled,
    exp2,
    int64s,
    narrow,
    prefetch,
    widen,
    widened,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, bits_of, claim, float_of

# Keys asked for ahead of the one in use: memory answers after the time of about four.
_AHEAD = 6


def walk(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend to one query token of each sequence.

    Args:
        q: [num_seqs, num_heads, head_dim] bf16, heads contiguous.
        kv_cache: see `pagoda_kernels.paged_attention.paged_attention`.
        slots: [num_keys] int64: the cache slots that the first sequence sees, then the second, …
        ends: [num_seqs] int64: where the slots of each end.
        out: shape and dtype of q, contiguous; written.
    """
    num_kv_heads, head_dim = kv_cache.shape[3:]
    require_slots(slots, kv_cache)
    _walk(
        q.data_ptr(),
        q.stride(0),
        kv_cache.data_ptr(),
        slots.data_ptr(),
        ends.data_ptr(),
        out.data_ptr(),
        len(q),
        q.shape[1],
        num_kv_heads,
        head_dim,
        len(slots),
        bits_of(scale),
    )


def _walk_parts(task: Task) -> None:
    """Arguments: q, q_stride, cache, slots, ends, out, num_seqs, num_heads, num_kv_heads, head_dim,
    num_keys, scale. A part is a key head of a sequence.
    """
    q_at, q_stride, cache_at, out_at = task[1], task[2], task[3], task[6]
    num_seqs, num_heads, num_kv_heads, head_dim = task[7], task[8], task[9], task[10]
    scale = np.float32(float_of(task[12]))
    slots, ends = int64s(task[4], (task[11],)), int64s(task[5], (num_seqs,))
    group = num_heads // num_kv_heads
    queries = np.empty((group, head_dim), np.float32)
    sums = np.empty((group, head_dim), np.float32)
    # Numbers from one slot to the next, of which the second half are values.
    stride = 2 * num_kv_heads * head_dim
    part = claim(task)
    while part < num_seqs * num_kv_heads:
        # The longest come last, and are best begun first.
        seq, head = num_seqs - 1 - part // num_kv_heads, part % num_kv_heads
        first = ends[seq - 1] if seq > 0 else 0
        seen = slots[first : ends[seq]]
        scores = np.empty((group, seen.size), np.float32)
        offset = head * group * head_dim
        q = bf16_bits(q_at + 2 * (seq * q_stride + offset), (group, head_dim))
        for i in range(group):
            widen(q[i], queries[i])
        keys_at = cache_at + 2 * head * head_dim
        _score(queries, keys_at, stride, seen, scores)
        for i in range(group):
            _softmax(scores[i], scale)
        values_at = keys_at + 2 * num_kv_heads * head_dim
        _weigh(scores, values_at, stride, seen, sums)
        out = bf16_bits(out_at + 2 * (seq * num_heads * head_dim + offset), (group, head_dim))
        for i in range(group):
            narrow(sums[i], out[i])
        part = claim(task)


_walk = ThreadedKernel(_walk_parts)


@compiled
def _score(queries: Array, keys_at: int, stride: int, slots: Array, scores: Array) -> None:
    """scores[query, key] = query · key"""
    group, head_dim = queries.shape
    for index in range(slots.size):
        if index + _AHEAD < slots.size:
            prefetch(keys_at + 2 * stride * slots[index + _AHEAD], 2 * head_dim)
        key = bf16_bits(keys_at + 2 * stride * slots[index], (head_dim,))
        first = 0
        while first + 4 <= group:
            _score_four(queries[first : first + 4], key, scores[first : first + 4, index])
            first += 4
        for i in range(first, group):
            scores[i, index] = _score_one(queries[i], key)


@compiled
def _score_four(queries: Array, key: Array, scores: Array) -> None:
    """Four at once, because widening the key takes as long as one of them."""
    a = b = c = d = np.float32(0)
    for i in range(key.size):
        number = widened(key[i])
        a += queries[0, i] * number
        b += queries[1, i] * number
        c += queries[2, i] * number
        d += queries[3, i] * number
    scores[0], scores[1], scores[2], scores[3] = a, b, c, d


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
def _weigh(weights: Array, values_at: int, stride: int, slots: Array, sums: Array) -> None:
    """sums[query] = sum over keys of weights[query, key] * value"""
    group, head_dim = sums.shape
    for i in range(group):
        for j in range(head_dim):
            sums[i, j] = np.float32(0)
    for index in range(0, slots.size - 1, 2):
        for ahead in range(index + _AHEAD, min(index + _AHEAD + 2, slots.size)):
            prefetch(values_at + 2 * stride * slots[ahead], 2 * head_dim)
        value = bf16_bits(values_at + 2 * stride * slots[index], (head_dim,))
        next_value = bf16_bits(values_at + 2 * stride * slots[index + 1], (head_dim,))
        first = 0
        while first + 2 <= group:
            some = weights[first : first + 2, index : index + 2]
            _weigh_two(some, value, next_value, sums[first : first + 2])
            first += 2
        if first < group:
            _weigh_one(weights[first, index], value, sums[first])
            _weigh_one(weights[first, index + 1], next_value, sums[first])
    if slots.size % 2:
        value = bf16_bits(values_at + 2 * stride * slots[slots.size - 1], (head_dim,))
        for i in range(group):
            _weigh_one(weights[i, slots.size - 1], value, sums[i])


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
