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

from pagoda_kernels.cpu.attention.chunk_keys import ask_for, empty_packed_keys, pack_group
from pagoda_kernels.cpu.attention.chunk_merge import merge_parts, narrow_group, write_row
from pagoda_kernels.cpu.attention.chunk_plan import KEY_BLOCK, Arguments, ChunkPlan, Part
from pagoda_kernels.cpu.compiled import LOG2_E, Array, address_of, compiled, copy, exp2, fill
from pagoda_kernels.cpu.formats import UNITS, VIEWS, bf16_bits, floats, int64s, is_common
from pagoda_kernels.cpu.panels import (
    BF16,
    BYTES_PER_STEP,
    GROUP_SIZE,
    MOST_ROWS,
    STEP_BYTES,
    make_dot,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader
from pagoda_kernels.kv_cache import LARGEST, KVCache

_ZERO, _ONE = np.float32(0), np.float32(1)


_dot = make_dot(BF16)
_arguments, _part = make_reader(Arguments), make_reader(Part)
_PART_BYTES = 8 * len(Part._fields)


def attend_chunks(
    q: torch.Tensor,
    kv_cache: KVCache,
    plan: ChunkPlan,
    scale: float,
    partials: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend to the query tokens of all chunks of a step.

    Args:
        q: [num_tokens, num_heads, head_dim] bf16, heads contiguous.
        kv_cache: in bf16 or 8 bits.
        partials: [plan.num_partial_numbers] fp32: memory to use.
        out: shape and dtype of q, contiguous; written.
    """
    numbers, scales = kv_cache
    num_slots, (num_kv_heads, head_dim) = numbers.shape[:2].numel(), numbers.shape[3:]
    arguments = (
        q,
        q.stride(0),
        numbers,
        scales if scales is not None else 0,
        num_slots,
        plan.slots,
        len(plan.slots),
        partials,
        plan.partial_size,
        out,
        q.shape[1],
        num_kv_heads,
        head_dim,
        scale * float(LOG2_E),
        plan.window,
        plan.most_rows,
        plan.parts,
        len(plan.parts),
        plan.merges,
        len(plan.merges),
    )
    _ATTEND[numbers.dtype](*arguments)
    # With nothing to merge too, so that no later step waits for the compiler.
    merge_parts(*arguments)


class _Scratch(NamedTuple):
    """A thread's own memory."""

    queries: Array
    """[most_rows, head_dim] bf16."""
    scores: Array
    """[KEY_BLOCK / GROUP_SIZE, num_rows, GROUP_SIZE] fp32."""
    weights: Array
    """[num_rows, keys] bf16."""
    factors: Array
    """[most_rows] fp32: what each row's sums of before must be multiplied by."""
    zeros: Array


def _make_kernel(kv_dtype: torch.dtype) -> ThreadedKernel:
    view, is_scaled = VIEWS[kv_dtype], kv_dtype in LARGEST
    unit = np.float32(UNITS.get(kv_dtype, 1.0))

    def attend_parts(task: Task) -> None:
        """A part of the work is a Part of the plan for one key head."""
        a = _arguments(task)
        slots = int64s(a.slots, (a.num_slots,))
        scratch = _Scratch(
            np.empty((a.most_rows, a.head_dim), np.uint16),
            np.empty(a.most_rows * KEY_BLOCK, np.float32),
            np.empty(a.most_rows * KEY_BLOCK, np.uint16),
            np.empty(a.most_rows, np.float32),
            np.zeros(GROUP_SIZE, np.float32),
        )
        packed = empty_packed_keys(KEY_BLOCK, a.head_dim, is_scaled)
        num_rows = 2 * a.num_kv_heads * a.num_cache_slots
        cache = view(a.kv_cache, (num_rows, a.head_dim))
        scales = floats(a.scales, (num_rows,)) if is_scaled else None
        own_sums = np.empty(a.partial_size, np.float32)
        claimed = claim(task)
        while claimed < a.num_parts * a.num_kv_heads:
            head = claimed % a.num_kv_heads
            part = _part(a.parts + claimed // a.num_kv_heads * _PART_BYTES)
            sums = address_of(own_sums)
            if part.partial >= 0:
                sums = a.partials + 4 * a.partial_size * (part.partial * a.num_kv_heads + head)
            seen = slots[part.first_slot : part.first_slot + part.num_keys]
            _attend_part(a, part, head, cache, scales, unit, seen, packed, scratch, sums)
            claimed = claim(task)

    is_ahead = is_common(torch.bfloat16, kv_dtype)
    return ThreadedKernel(attend_parts, BF16.features, str(kv_dtype), is_ahead)


_ATTEND = {kv_dtype: _make_kernel(kv_dtype) for kv_dtype in (torch.bfloat16, *LARGEST)}


@compiled
def _attend_part(
    a: Any,
    part: Any,
    head: int,
    cache: Array,
    scales: Any,
    unit: Any,
    slots: Array,
    packed: Any,
    scratch: Any,
    sums_at: int,
) -> None:
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
    key_scales = packed.key_scales if scales is not None else None
    value_scales = packed.value_scales if scales is not None else None
    for first in range(0, part.num_keys, KEY_BLOCK):
        count = min(KEY_BLOCK, part.num_keys - first)
        num_groups = (count + GROUP_SIZE - 1) // GROUP_SIZE
        for index in range(num_groups):
            some = slots[first + index * GROUP_SIZE :]
            pack_group(packed, cache, scales, unit, a.num_kv_heads, head, some, index, num_groups)
            _score(scratch, packed.keys, num_rows, index, cache, a.num_kv_heads, head, some)
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
                key_scales,
                value_scales,
                weights,
                factors,
                largest,
                totals,
            )
        _add_values(scratch, packed.values, num_groups, num_rows, sums_at, a.head_dim)
    if part.partial < 0:
        for row in range(num_rows):
            token, i = part.first_token + row // group, head * group + row % group
            to = a.out + 2 * (token * a.num_heads + i) * a.head_dim
            write_row(sums_at + 4 * row * GROUP_SIZE, num_rows, a.head_dim, totals[row], to)


@compiled
def _score(
    scratch: Any,
    keys: Array,
    num_rows: int,
    index: int,
    cache: Array,
    num_kv_heads: int,
    head: int,
    slots: Array,
) -> None:
    """Scores of group number index. Args: slots: its keys', and then those to ask for meanwhile."""
    queries, scores, zeros = scratch.queries, scratch.scores, scratch.zeros
    row_bytes = 2 * queries.shape[1]
    wanted, following = GROUP_SIZE, min(2 * GROUP_SIZE, slots.size)
    row = 0
    while row < num_rows:
        # Each pass asks for its share of the next keys.
        share = (row + MOST_ROWS) * GROUP_SIZE // num_rows
        while wanted < min(GROUP_SIZE + share, following):
            ask_for(cache, num_kv_heads, head, slots[wanted])
            wanted += 1
        row += _dot(
            address_of(keys),
            row_bytes // BYTES_PER_STEP,
            address_of(queries) + row * row_bytes,
            row_bytes,
            num_rows - row,
            address_of(zeros),
            0,
            address_of(scores) + 4 * (index * num_rows + row) * GROUP_SIZE,
            address_of(keys),
            0,
        )


@compiled
def _weigh(
    scores: Array,
    row: int,
    num_rows: int,
    width: int,
    begin: int,
    end: int,
    scale: Any,
    key_scales: Any,
    value_scales: Any,
    weights: Array,
    factors: Array,
    largest: Array,
    totals: Array,
) -> None:
    """A row's scores of keys begin … end - 1 as weights in bf16, zero for all other keys.

    The row's largest score, its total of weights and its factor are updated.

    Args: key_scales, value_scales: fp32, what scores and weights are times; or None.
    """
    weights_at = address_of(weights) + 2 * row * width
    stride, first = num_rows * GROUP_SIZE, row * GROUP_SIZE
    if begin >= end:
        fill(bf16_bits(weights_at, (width,)), np.uint16(0))
        factors[row] = _ONE
        return
    if key_scales is not None:
        for group in range(width // GROUP_SIZE):
            some = scores[first + group * stride : first + group * stride + GROUP_SIZE]
            for i in range(GROUP_SIZE):
                some[i] *= key_scales[group * GROUP_SIZE + i]
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
        if value_scales is not None:
            for i in range(GROUP_SIZE):
                some[i] *= value_scales[group * GROUP_SIZE + i]
        narrow_group(address_of(some), weights_at + 2 * group * GROUP_SIZE)
    factor = exp2((before - most) * scale)
    largest[row], factors[row] = most, factor
    totals[row] = totals[row] * factor + total


@compiled
def _add_values(
    scratch: Any, values: Array, num_groups: int, num_rows: int, sums_at: int, head_dim: int
) -> None:
    """sums = sums * factors + weights @ values"""
    weights, factors = scratch.weights, scratch.factors
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
                2 * width // BYTES_PER_STEP,
                address_of(weights) + 2 * row * width,
                2 * width,
                num_rows - row,
                at,
                4 * GROUP_SIZE,
                at,
                panels,
                0,
            )
