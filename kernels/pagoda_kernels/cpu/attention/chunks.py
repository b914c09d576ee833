"""Attention of prompt chunks in bf16, with keys and values packed in panels as they are read.

A part of the work is a block of a chunk's queries, one key head, and a segment of the keys that
these may see. Some keys at a time are packed, multiplied by all queries of the block, turned into
weights, and multiplied by the values; what was summed before is scaled down when a larger score is
found. So scores never leave the processor's cache, and each is computed once and rounded never.
Where a block has several segments their sums are merged at the end.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention
2, 2023, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagoda_kernels.cpu.attention.chunk_plan import KEY_BLOCK, Chunks, Merge, Part
from pagoda_kernels.cpu.attention.slots import require_slots
from pagoda_kernels.cpu.compiled import (
    LOG2_E,
    Array,
    address_of,
    bf16_bits,
    compiled,
    copy,
    exp2,
    floats,
    int64s,
    prefetch,
)
from pagoda_kernels.cpu.panels import (
    BF16,
    GROUP_SIZE,
    MOST_ROWS,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    empty_panels,
    interleave_group,
    make_dot,
    narrow_panel,
    transpose_panel,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, bits_of, claim, float_of

_dot = make_dot(BF16)

_PART_FIELDS, _MERGE_FIELDS = len(Part._fields), len(Merge._fields)
_ZERO, _ONE = np.float32(0), np.float32(1)


def attend_chunks(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    chunks: Chunks,
    scale: float,
    partials: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend to the query tokens of all chunks of a step.

    Args:
        q: [num_tokens, num_heads, head_dim] bf16, heads contiguous.
        kv_cache: see `pagoda_kernels.paged_attention.paged_attention`.
        partials: [chunks.num_partials * num_kv_heads, chunks.partial_size] fp32: memory to use.
        out: shape and dtype of q, contiguous; written.
    """
    num_kv_heads, head_dim = kv_cache.shape[3:]
    require_slots(chunks.slots, kv_cache)
    shared = (
        q.data_ptr(),
        q.stride(0),
        kv_cache.data_ptr(),
        chunks.slots.data_ptr(),
        len(chunks.slots),
        partials.data_ptr(),
        partials.shape[1],
        out.data_ptr(),
        q.shape[1],
        num_kv_heads,
        head_dim,
        bits_of(scale * float(LOG2_E)),
        chunks.window,
        chunks.most_rows,
    )
    _attend(*shared, chunks.parts.data_ptr(), len(chunks.parts))
    if len(chunks.merges) or not _merge.is_compiled:
        # With nothing to merge too the first time, so that no later step waits for the compiler.
        _merge(*shared, chunks.merges.data_ptr(), len(chunks.merges))


def _attend_parts(task: Task) -> None:
    """Arguments: q, q_stride, cache, slots, num_slots, partials, partial_size, out, num_heads,
    num_kv_heads, head_dim, scale (of powers of two), window, most_rows, parts, num_parts.
    """
    q_at, q_stride, cache_at = task[1], task[2], task[3]
    slots = int64s(task[4], (task[5],))
    partials_at, partial_size, out_at = task[6], task[7], task[8]
    num_heads, num_kv_heads, head_dim = task[9], task[10], task[11]
    scale, window, most_rows = np.float32(float_of(task[12])), task[13], task[14]
    num_parts = task[16]
    parts = int64s(task[15], (num_parts, _PART_FIELDS))
    group = num_heads // num_kv_heads
    queries = np.empty((most_rows, head_dim), np.uint16)
    keys, values = empty_panels(GROUP_SIZE * head_dim), empty_panels(KEY_BLOCK * head_dim)
    scores = np.empty(most_rows * KEY_BLOCK, np.float32)
    weights = np.empty(most_rows * KEY_BLOCK, np.uint16)
    own_sums = np.empty(most_rows * head_dim, np.float32)
    own_state = np.empty(2 * most_rows, np.float32)
    factors = np.empty(most_rows, np.float32)
    # Bytes from one slot to the next, of which the second half are values.
    stride = 4 * num_kv_heads * head_dim
    part = claim(task)
    while part < num_parts * num_kv_heads:
        index, head = part // num_kv_heads, part % num_kv_heads
        first_token, num_tokens, first_slot = parts[index, 0], parts[index, 1], parts[index, 2]
        num_keys, position, partial = parts[index, 3], parts[index, 4], parts[index, 5]
        num_rows = num_tokens * group
        seen = slots[first_slot : first_slot + num_keys]
        for token in range(num_tokens):
            at = q_at + 2 * ((first_token + token) * q_stride + head * group * head_dim)
            q = bf16_bits(at, (group, head_dim))
            for i in range(group):
                copy(q[i], queries[token * group + i])
        sums, state = address_of(own_sums), address_of(own_state)
        if partial >= 0:
            sums = partials_at + 4 * partial_size * (partial * num_kv_heads + head)
            state = sums + 4 * num_rows * head_dim
        _fill(floats(sums, (num_rows * head_dim,)), _ZERO)
        largest, totals = floats(state, (num_rows,)), floats(state + 4 * num_rows, (num_rows,))
        _fill(largest, np.float32(-np.inf))
        _fill(totals, _ZERO)
        keys_at = cache_at + 2 * head * head_dim
        for first in range(0, num_keys, KEY_BLOCK):
            count = min(KEY_BLOCK, num_keys - first)
            num_groups = (count + GROUP_SIZE - 1) // GROUP_SIZE
            _score(
                queries, num_rows, keys_at, stride, seen, first, num_groups, keys, values, scores
            )
            for row in range(num_rows):
                # Keys of this block that the row sees.
                end = position + row // group + 1 - first
                begin = max(end - window, 0) if window > 0 else 0
                end = min(end, count)
                _weigh(
                    scores,
                    row,
                    num_rows,
                    num_groups,
                    begin,
                    end,
                    scale,
                    weights,
                    largest,
                    totals,
                    factors,
                )
            _add_values(values, num_groups, weights, num_rows, factors, sums, head_dim)
        if partial < 0:
            for row in range(num_rows):
                token, i = first_token + row // group, head * group + row % group
                to = out_at + 2 * (token * num_heads + i) * head_dim
                _write_row(sums + 4 * row * GROUP_SIZE, num_rows, head_dim, totals[row], to)
        part = claim(task)


_attend = ThreadedKernel(_attend_parts, needs=BF16.features)


@compiled
def _fill(numbers: Array, number: Any) -> None:
    for i in range(numbers.size):
        numbers[i] = number


@compiled
def _score(
    queries: Array,
    num_rows: int,
    keys_at: int,
    stride: int,
    slots: Array,
    first: int,
    num_groups: int,
    keys: Array,
    values: Array,
    scores: Array,
) -> None:
    """Scores of some keys, [num_groups, num_rows, GROUP_SIZE]; and their values, packed."""
    head_dim = queries.shape[1]
    row_bytes = 2 * head_dim
    values_stride = num_groups * GROUP_SIZE // 2 * STEP_BYTES
    addresses = np.empty(GROUP_SIZE, np.int64)
    zeros = np.zeros(GROUP_SIZE, np.float32)
    for group in range(num_groups):
        begin = first + group * GROUP_SIZE
        for i in range(GROUP_SIZE):
            # Past the end the last key is repeated: slots that nobody wrote are never read.
            addresses[i] = keys_at + stride * slots[min(begin + i, slots.size - 1)]
        _pack_keys(addresses, head_dim, address_of(keys))
        values_at = address_of(values) + group * GROUP_SIZE // 2 * STEP_BYTES
        _pack_values(addresses, stride // 2, head_dim, values_at, values_stride)
        wanted, following = begin + GROUP_SIZE, min(begin + 2 * GROUP_SIZE, slots.size)
        row = 0
        while row < num_rows:
            # Each pass asks for its share of the next keys.
            share = (row + MOST_ROWS) * GROUP_SIZE // num_rows
            while wanted < min(begin + GROUP_SIZE + share, following):
                key_at = keys_at + stride * slots[wanted]
                prefetch(key_at, row_bytes)
                prefetch(key_at + stride // 2, row_bytes)
                wanted += 1
            row += _dot(
                address_of(keys),
                address_of(queries) + row * row_bytes,
                row_bytes,
                num_rows - row,
                address_of(zeros),
                0,
                address_of(scores) + 4 * (group * num_rows + row) * GROUP_SIZE,
                address_of(keys),
                0,
            )


@compiled
def _pack_keys(addresses: Array, head_dim: int, to: int) -> None:
    """A group of panels whose columns are keys."""
    for panel in range(2):
        some = address_of(addresses) + 8 * panel * PANEL_SIZE
        for offset in range(0, 2 * head_dim, VECTOR_BYTES):
            target = to + panel * VECTOR_BYTES + offset // 4 * STEP_BYTES
            transpose_panel(some, offset, target, STEP_BYTES)


@compiled
def _pack_values(addresses: Array, offset: int, head_dim: int, to: int, stride: int) -> None:
    """The same keys' values as GROUP_SIZE / 2 steps of panels whose columns are numbers of a head.

    Args: stride: bytes from a group of panels to the next.
    """
    for column in range(head_dim // GROUP_SIZE):
        at, target = offset + 2 * column * GROUP_SIZE, to + column * stride
        for pair in range(GROUP_SIZE // 2):
            even, odd = addresses[2 * pair] + at, addresses[2 * pair + 1] + at
            interleave_group(even, odd, target + pair * STEP_BYTES)


@compiled
def _weigh(
    scores: Array,
    row: int,
    num_rows: int,
    num_groups: int,
    begin: int,
    end: int,
    scale: Any,
    weights: Array,
    largest: Array,
    totals: Array,
    factors: Array,
) -> None:
    """A row's scores of keys begin … end - 1 as weights in bf16, zero for all other keys.

    The row's largest score and total of weights are updated; factors[row] is what sums of before
    must be multiplied by.
    """
    width = num_groups * GROUP_SIZE
    weights_at = address_of(weights) + 2 * row * width
    stride = num_rows * GROUP_SIZE
    first = row * GROUP_SIZE
    if begin >= end:
        _fill(bf16_bits(weights_at, (width,)), np.uint16(0))
        factors[row] = _ONE
        return
    for i in range(begin):
        scores[first + i // GROUP_SIZE * stride + i % GROUP_SIZE] = np.float32(-np.inf)
    for i in range(end, width):
        scores[first + i // GROUP_SIZE * stride + i % GROUP_SIZE] = np.float32(-np.inf)
    before = largest[row]
    most = before
    for group in range(num_groups):
        some = scores[first + group * stride : first + group * stride + GROUP_SIZE]
        for i in range(GROUP_SIZE):
            most = max(most, some[i])
    total = _ZERO
    for group in range(num_groups):
        some = scores[first + group * stride : first + group * stride + GROUP_SIZE]
        for i in range(GROUP_SIZE):
            some[i] = exp2((some[i] - most) * scale)
            total += some[i]
        _narrow_group(address_of(some), weights_at + 2 * group * GROUP_SIZE)
    factor = exp2((before - most) * scale)
    largest[row], factors[row] = most, factor
    totals[row] = totals[row] * factor + total


@compiled
def _add_values(
    values: Array,
    num_groups: int,
    weights: Array,
    num_rows: int,
    factors: Array,
    sums_at: int,
    head_dim: int,
) -> None:
    """sums = sums * factors + weights @ values; sums are [head_dim / GROUP_SIZE, num_rows, …]."""
    width = num_groups * GROUP_SIZE
    for column in range(head_dim // GROUP_SIZE):
        panels = address_of(values) + column * (width // 2 * STEP_BYTES)
        begin = sums_at + 4 * column * num_rows * GROUP_SIZE
        sums = floats(begin, (num_rows, GROUP_SIZE))
        for row in range(num_rows):
            for i in range(GROUP_SIZE):
                sums[row, i] *= factors[row]
        row = 0
        while row < num_rows:
            at = begin + 4 * row * GROUP_SIZE
            row += _dot(
                panels,
                address_of(weights) + 2 * row * width,
                2 * width,
                num_rows - row,
                at,
                4 * GROUP_SIZE,
                at,
                panels,
                0,
            )


@compiled
def _write_row(sums_at: int, num_rows: int, head_dim: int, total: Any, to: int) -> None:
    """A row's sums divided by its total of weights, in bf16; the sums are overwritten."""
    for column in range(head_dim // GROUP_SIZE):
        at = sums_at + 4 * column * num_rows * GROUP_SIZE
        sums = floats(at, (GROUP_SIZE,))
        for i in range(GROUP_SIZE):
            sums[i] /= total
        _narrow_group(at, to + 2 * column * GROUP_SIZE)


@compiled
def _narrow_group(numbers_at: int, to: int) -> None:
    narrow_panel(numbers_at, to)
    narrow_panel(numbers_at + VECTOR_BYTES, to + VECTOR_BYTES // 2)


def _merge_parts(task: Task) -> None:
    """Arguments: those of `_attend_parts`, but merges in the place of parts."""
    partials_at, partial_size, out_at = task[6], task[7], task[8]
    num_heads, num_kv_heads, head_dim = task[9], task[10], task[11]
    scale, num_merges = np.float32(float_of(task[12])), task[16]
    merges = int64s(task[15], (num_merges, _MERGE_FIELDS))
    group, num_columns = num_heads // num_kv_heads, head_dim // GROUP_SIZE
    sums = np.empty(GROUP_SIZE, np.float32)
    part = claim(task)
    while part < num_merges * num_kv_heads * num_columns:
        column, head = part % num_columns, part // num_columns % num_kv_heads
        index = part // (num_columns * num_kv_heads)
        first_token, num_tokens = merges[index, 0], merges[index, 1]
        num_rows, num_partials = num_tokens * group, merges[index, 3]
        stride = 4 * partial_size * num_kv_heads
        begin = partials_at + stride * merges[index, 2] + 4 * partial_size * head
        for row in range(num_rows):
            state = begin + 4 * (num_rows * head_dim + row)
            most, total = np.float32(-np.inf), _ZERO
            for i in range(num_partials):
                most = max(most, floats(state + i * stride, (1,))[0])
            _fill(sums, _ZERO)
            for i in range(num_partials):
                factor = exp2((floats(state + i * stride, (1,))[0] - most) * scale)
                total += factor * floats(state + i * stride + 4 * num_rows, (1,))[0]
                at = begin + i * stride + 4 * (column * num_rows + row) * GROUP_SIZE
                others = floats(at, (GROUP_SIZE,))
                for j in range(GROUP_SIZE):
                    sums[j] += factor * others[j]
            token, i = first_token + row // group, head * group + row % group
            to = out_at + 2 * ((token * num_heads + i) * head_dim + column * GROUP_SIZE)
            _write_row(address_of(sums), 1, GROUP_SIZE, total, to)
        part = claim(task)


_merge = ThreadedKernel(_merge_parts, needs=BF16.features)
