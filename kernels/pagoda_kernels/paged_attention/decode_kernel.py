"""Attention of single query tokens: every key and value is read once for all heads that share it.

The keys of a row are split among programs, and a second kernel adds up what they found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch
from pagoda_kernels.paged_attention.backend import AttentionSpec
from pagoda_kernels.paged_attention.tiles import (
    LOG2_E,
    Step,
    add_keys,
    padded_dim,
    tile_arguments,
    to_factors,
)

MOST_SPLITS = 32
# A split of fewer keys would not be worth what adding it up costs.
_LEAST_SPLIT = 128
# Programs for each processor of a GPU that there should be, to keep its memory busy.
_PROGRAMS_PER_PROCESSOR = 3
# Of a deterministic step, whatever its other rows are.
_FIXED_SPLITS = 16
# Sums of splits are kept for so many rows times query heads at a time.
_MOST_SUMS = 4096


class Rows(NamedTuple):
    """Query tokens that are attended to one by one; all are int32 [num_rows], on the device."""

    tokens: torch.Tensor
    """Of the step."""
    seqs: torch.Tensor
    """Rows of the block table."""
    num_keys: torch.Tensor
    """That the sequence has up to the token."""


class Splits(NamedTuple):
    """How the keys of rows are parted, so that a part has _LEAST_SPLIT of them or more."""

    most: int
    """Parts that a row's keys are in, at most."""
    num_programs: int
    """Parts that a row of this step may have."""


def split_keys(spec: AttentionSpec, num_rows: int, longest: int, num_processors: int) -> Splits:
    """For rows with at most `longest` keys each.

    A row's parts depend on the other rows, unless the spec is deterministic: then on its own keys.
    """
    most = _FIXED_SPLITS
    if not spec.is_deterministic:
        num_programs = max(1, num_rows * spec.num_kv_heads)
        most = min(MOST_SPLITS, triton.cdiv(_PROGRAMS_PER_PROCESSOR * num_processors, num_programs))
    return Splits(most, min(most, triton.cdiv(longest, _LEAST_SPLIT)))


def attend_rows(step: Step, spec: AttentionSpec, layer: int, rows: Rows, splits: Splits) -> None:
    """Write the rows' tokens of the step."""
    num_rows, dim = len(rows.tokens), padded_dim(spec)
    most_rows, sums, weights = num_rows, None, None
    if splits.num_programs > 1:
        most_rows = min(num_rows, max(1, _MOST_SUMS // spec.num_heads))
        shape = (most_rows, spec.num_heads, splits.num_programs)
        sums = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=step.out.device)
        weights = torch.empty((*shape, 2), dtype=torch.float32, device=step.out.device)
    constants = tile_arguments(spec, layer)
    for first in range(0, num_rows, most_rows):
        tokens, seqs, num_keys = (part[first : first + most_rows] for part in rows)
        launch(
            decode_kernel,
            (len(tokens) * spec.num_kv_heads, splits.num_programs),
            *step.arguments,
            spec.scale,
            tokens,
            seqs,
            num_keys,
            sums,
            weights,
            splits.most,
            _LEAST_SPLIT,
            **constants,
            ROWS=max(16, triton.next_power_of_2(constants["GROUP"])),
            # Small tiles and few warps: several programs fit a processor, and hide each other's
            # waits; each warp does all sums of scores, for which numbers of 8 bits leave less time.
            TILE=min(64, 4096 // dim),
            num_warps=2 if spec.kv_dtype is spec.dtype or dim > 128 else 1,
            num_stages=3,
        )
        if sums is not None:
            launch(
                merge_kernel,
                (len(tokens), spec.num_heads),
                sums,
                weights,
                tokens,
                step.out,
                splits.num_programs,
                HEAD_DIM=spec.head_dim,
                PADDED_DIM=constants["PADDED_DIM"],
                MOST_SPLITS=MOST_SPLITS,
                num_warps=4,
            )


@triton.jit(
    do_not_specialize=["table_stride", "most_splits", "least_split"],
    do_not_specialize_on_alignment=["table_ptr", "tokens_ptr", "seqs_ptr", "num_keys_ptr"],
)
def decode_kernel(
    q_ptr, numbers_ptr, scales_ptr, table_ptr, slopes_ptr, sinks_ptr, out_ptr, table_stride,
    scale, tokens_ptr, seqs_ptr, num_keys_ptr, sums_ptr, weights_ptr,
    most_splits, least_split,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The program (row * NUM_KV_HEADS + key head, split): an equal part of the keys in tiles."""
    row, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    num_keys = tl.load(num_keys_ptr + row)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    seq = tl.load(seqs_ptr + row).to(tl.int64)
    oldest = 0 if WINDOW == 0 else tl.maximum(num_keys - WINDOW, 0)
    size = tl.maximum(tl.cdiv(num_keys - oldest, most_splits), least_split)
    size = tl.cdiv(size, TILE) * TILE
    first = oldest + split * size
    last = tl.minimum(first + size, num_keys)

    group, dims = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    heads = kv_head * GROUP + group
    is_head, within = group < GROUP, (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + token * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM) + places, within, 0.0)
    q, scales = to_factors(q, scale, FORMAT)
    slopes = None if slopes_ptr is None else tl.load(slopes_ptr + heads, is_head, 0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, is_head, float("-inf")) * LOG2_E
        # The first split has the sink: a score without a value.
        most = tl.where(split == 0, sinks, most)
    total = tl.where(most > float("-inf"), 1.0, 0.0)
    positions = tl.full([ROWS], 0, tl.int32) + (num_keys - 1)
    # fmt: off
    acc, most, total = add_keys(
        most, total, q, scales, positions, slopes, first, last, first, last,
        numbers_ptr, scales_ptr, table_ptr + seq * table_stride, kv_head,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SOFT_CAP, FORMAT, 0, TILE,
    )
    # fmt: on
    if sums_ptr is None:
        out_at = out_ptr + token * (GROUP * NUM_KV_HEADS * HEAD_DIM) + places
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), within)
    else:
        parts = (row.to(tl.int64) * (GROUP * NUM_KV_HEADS) + heads) * num_splits + split
        # What a split without keys found is not read.
        if first < last:
            tl.store(sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :], acc, within)
        tl.store(weights_ptr + 2 * parts, most, is_head)
        tl.store(weights_ptr + 2 * parts + 1, total, is_head)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["tokens_ptr"])
def merge_kernel(
    sums_ptr, weights_ptr, tokens_ptr, out_ptr, num_splits,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """The program (row, head): what the splits of a row's keys found, as one."""
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    splits, dims = tl.arange(0, MOST_SPLITS), tl.arange(0, PADDED_DIM)
    parts = (row.to(tl.int64) * num_heads + head) * num_splits + splits
    most = tl.load(weights_ptr + 2 * parts, splits < num_splits, float("-inf"))
    total = tl.load(weights_ptr + 2 * parts + 1, splits < num_splits, 0.0)
    found = (total > 0.0)[:, None] & (dims < HEAD_DIM)[None, :]
    sums = tl.load(sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :], found, 0.0)
    shares = tl.exp2(most - tl.max(most, 0))
    out = tl.sum(sums * shares[:, None], 0) / tl.sum(total * shares, 0)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    out_at = out_ptr + (token * num_heads + head) * HEAD_DIM + dims
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), dims < HEAD_DIM)


def find_slots(
    slots: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int
) -> None:
    """Write into slots, [num_seqs] int64, where the newest token of each sequence goes."""
    num_seqs, block = len(slots), 128
    # fmt: off
    launch(
        slots_kernel, (triton.cdiv(num_seqs, block),),
        slots, block_table, seq_lens, block_table.stride(0), num_seqs,
        BLOCK_SIZE=block_size, BLOCK=block, num_warps=4,
    )
    # fmt: on


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs"],
    do_not_specialize_on_alignment=["slots_ptr", "table_ptr", "seq_lens_ptr"],
)
def slots_kernel(
    slots_ptr, table_ptr, seq_lens_ptr, table_stride, num_seqs,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    seqs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = seqs < num_seqs
    newest = tl.load(seq_lens_ptr + seqs, inside, 1) - 1
    at = table_ptr + seqs.to(tl.int64) * table_stride + newest // BLOCK_SIZE
    blocks = tl.load(at, inside, 0).to(tl.int64)
    tl.store(slots_ptr + seqs, blocks * BLOCK_SIZE + newest % BLOCK_SIZE, inside)
