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

from typing import Any, NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.chunk_merge import merge_parts, narrow_group, write_row
from pagoda_kernels.cpu.attention.chunk_plan import KEY_BLOCK, Arguments, ChunkPlan, Part
from pagoda_kernels.cpu.compiled import (
    LOG2_E,
    Array,
    address_of,
    bf16_bits,
    compiled,
    copy,
    exp2,
    fill,
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
    transpose_panel,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader

_ZERO, _ONE = np.float32(0), np.float32(1)


_dot = make_dot(BF16)
_arguments, _part = make_reader(Arguments), make_reader(Part)
_PART_BYTES = 8 * len(Part._fields)


def attend_chunks(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: ChunkPlan,
    scale: float,
    partials: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend to the query tokens of all chunks of a step.

    Args:
        q: [num_tokens, num_heads, head_dim] bf16, heads contiguous.
        kv_cache: see `pagoda_kernels.paged_attention.AttentionBackend`.
        partials: [plan.num_partial_numbers] fp32: memory to use.
        out: shape and dtype of q, contiguous; written.
    """
    arguments = (
        q,
        q.stride(0),
        kv_cache,
        plan.slots,
        len(plan.slots),
        partials,
        plan.partial_size,
        out,
        q.shape[1],
        kv_cache.shape[3],
        kv_cache.shape[4],
        scale * float(LOG2_E),
        plan.window,
        plan.most_rows,
        plan.parts,
        len(plan.parts),
        plan.merges,
        len(plan.merges),
    )
    _attend(*arguments)
    # With nothing to merge too, so that no later step waits for the compiler.
    merge_parts(*arguments)


class _Scratch(NamedTuple):
    """A thread's own memory."""

    queries: Array
    """[most_rows, head_dim] bf16."""
    keys: Array
    """Panels of GROUP_SIZE keys."""
    values: Array
    """Panels of KEY_BLOCK values."""
    scores: Array
    """[KEY_BLOCK / GROUP_SIZE, num_rows, GROUP_SIZE] fp32."""
    weights: Array
    """[num_rows, keys] bf16."""
    factors: Array
    """[most_rows] fp32: what each row's sums of before must be multiplied by."""
    zeros: Array
    addresses: Array
    """[GROUP_SIZE] int64, of keys."""


def _attend_parts(task: Task) -> None:
    """A part of the work is a Part of the plan for one key head."""
    a = _arguments(task)
    slots = int64s(a.slots, (a.num_slots,))
    scratch = _Scratch(
        np.empty((a.most_rows, a.head_dim), np.uint16),
        empty_panels(GROUP_SIZE * a.head_dim),
        empty_panels(KEY_BLOCK * a.head_dim),
        np.empty(a.most_rows * KEY_BLOCK, np.float32),
        np.empty(a.most_rows * KEY_BLOCK, np.uint16),
        np.empty(a.most_rows, np.float32),
        np.zeros(GROUP_SIZE, np.float32),
        np.empty(GROUP_SIZE, np.int64),
    )
    own_sums = np.empty(a.partial_size, np.float32)
    claimed = claim(task)
    while claimed < a.num_parts * a.num_kv_heads:
        part, head = (
            _part(a.parts + claimed // a.num_kv_heads * _PART_BYTES),
            claimed % a.num_kv_heads,
        )
        sums = address_of(own_sums)
        if part.partial >= 0:
            sums = a.partials + 4 * a.partial_size * (part.partial * a.num_kv_heads + head)
        seen = slots[part.first_slot : part.first_slot + part.num_keys]
        _attend_part(a, part, head, seen, scratch, sums)
        claimed = claim(task)


_attend = ThreadedKernel(_attend_parts, needs=BF16.features)


@compiled
def _attend_part(a: Any, part: Any, head: int, slots: Array, scratch: Any, sums_at: int) -> None:
    """Args: slots: of the part's keys; sums_at: where its sums and then their state go."""
    group = a.num_heads // a.num_kv_heads
    num_rows = part.num_tokens * group
    for token in range(part.num_tokens):
        offset = (part.first_token + token) * a.q_stride + head * group * a.head_dim
        q = bf16_bits(a.q + 2 * offset, (group, a.head_dim))
        for i in range(group):
            copy(q[i], scratch.queries[token * group + i])
    state = sums_at + 4 * num_rows * a.head_dim
    largest, totals = floats(state, (num_rows,)), floats(state + 4 * num_rows, (num_rows,))
    # Taken out of the tuple once: each time counts a reference.
    scores, weights, factors = scratch.scores, scratch.weights, scratch.factors
    fill(floats(sums_at, (num_rows * a.head_dim,)), _ZERO)
    fill(largest, np.float32(-np.inf))
    fill(totals, _ZERO)
    # Bytes from one slot to the next, of which the second half are values.
    stride = 4 * a.num_kv_heads * a.head_dim
    keys_at = a.kv_cache + 2 * head * a.head_dim
    for first in range(0, part.num_keys, KEY_BLOCK):
        count = min(KEY_BLOCK, part.num_keys - first)
        num_groups = (count + GROUP_SIZE - 1) // GROUP_SIZE
        _score(scratch, num_rows, keys_at, stride, slots, first, num_groups)
        for row in range(num_rows):
            # Keys of this block that the row sees.
            end = part.position + row // group + 1 - first
            begin = max(end - a.window, 0) if a.window > 0 else 0
            _weigh(
                scores,
                row,
                num_rows,
                num_groups * GROUP_SIZE,
                begin,
                min(end, count),
                np.float32(a.scale),
                weights,
                factors,
                largest,
                totals,
            )
        _add_values(scratch, num_groups, num_rows, sums_at, a.head_dim)
    if part.partial < 0:
        for row in range(num_rows):
            token, i = part.first_token + row // group, head * group + row % group
            to = a.out + 2 * (token * a.num_heads + i) * a.head_dim
            write_row(sums_at + 4 * row * GROUP_SIZE, num_rows, a.head_dim, totals[row], to)


@compiled
def _score(
    scratch: Any,
    num_rows: int,
    keys_at: int,
    stride: int,
    slots: Array,
    first: int,
    num_groups: int,
) -> None:
    """Scores of some keys; and their values, packed."""
    keys, values, zeros = scratch.keys, scratch.values, scratch.zeros
    queries, scores, addresses = scratch.queries, scratch.scores, scratch.addresses
    head_dim = queries.shape[1]
    row_bytes = 2 * head_dim
    values_stride = num_groups * GROUP_SIZE // 2 * STEP_BYTES
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
    width: int,
    begin: int,
    end: int,
    scale: Any,
    weights: Array,
    factors: Array,
    largest: Array,
    totals: Array,
) -> None:
    """A row's scores of keys begin … end - 1 as weights in bf16, zero for all other keys.

    The row's largest score, its total of weights and its factor are updated.
    """
    weights_at = address_of(weights) + 2 * row * width
    stride, first = num_rows * GROUP_SIZE, row * GROUP_SIZE
    if begin >= end:
        fill(bf16_bits(weights_at, (width,)), np.uint16(0))
        factors[row] = _ONE
        return
    for i in range(begin):
        scores[first + i // GROUP_SIZE * stride + i % GROUP_SIZE] = np.float32(-np.inf)
    for i in range(end, width):
        scores[first + i // GROUP_SIZE * stride + i % GROUP_SIZE] = np.float32(-np.inf)
    before = largest[row]
    most = before
    for group in range(width // GROUP_SIZE):
        some = scores[first + group * stride : first + group * stride + GROUP_SIZE]
        for i in range(GROUP_SIZE):
            most = max(most, some[i])
    total = _ZERO
    for group in range(width // GROUP_SIZE):
        some = scores[first + group * stride : first + group * stride + GROUP_SIZE]
        for i in range(GROUP_SIZE):
            some[i] = exp2((some[i] - most) * scale)
            total += some[i]
        narrow_group(address_of(some), weights_at + 2 * group * GROUP_SIZE)
    factor = exp2((before - most) * scale)
    largest[row], factors[row] = most, factor
    totals[row] = totals[row] * factor + total


@compiled
def _add_values(scratch: Any, num_groups: int, num_rows: int, sums_at: int, head_dim: int) -> None:
    """sums = sums * factors + weights @ values"""
    values, weights, factors = scratch.values, scratch.weights, scratch.factors
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
