"""Attention of prompt chunks: tiles of query tokens, all heads of a key head at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch
from pagoda_kernels.paged_attention.backend import AttentionSpec
from pagoda_kernels.paged_attention.tiles import (
    LOG2_E,
    Step,
    add_keys,
    has_much_shared_memory,
    padded_dim,
    tile_arguments,
    to_factors,
)


class Chunks(NamedTuple):
    """The query tokens of prompt chunks, cut into tiles."""

    tiles: torch.Tensor
    """[num_tiles, fields of `cut_chunks`] int32, on the device."""
    num_rows: int
    """Query tokens of a tile times the heads that share a key head, at most."""


def rows_of_tiles(spec: AttentionSpec, query_lens: np.ndarray, num_processors: int) -> int:
    """64, from which Hopper's products are whole, or 128, which read keys half as often.

    Args: query_lens: [num_chunks].
    """
    group = spec.num_heads // spec.num_kv_heads
    num_programs = int((-(-query_lens // max(1, 128 // group))).sum()) * spec.num_kv_heads
    # Numbers of 8 bits are widened in registers, of which 128 rows leave too few.
    has_room = padded_dim(spec) <= 128 and spec.kv_dtype is spec.dtype
    is_large = has_room and num_programs >= num_processors
    # A token's heads are not parted.
    return max(128 if is_large else 64, int(triton.next_power_of_2(group)))


def cut_chunks(
    seqs: np.ndarray, query_lens: np.ndarray, seq_lens: np.ndarray, num_tokens: int
) -> np.ndarray:
    """Tiles of up to num_tokens of each chunk: what is longest is begun first.

    Args: seqs: [num_chunks]; query_lens, seq_lens: [num_seqs] of the step.
    Returns: [num_tiles, 4] int32: first token, sequence, tokens, position of the first.
    """
    counts = -(-query_lens[seqs] // num_tokens)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets, seqs = offsets * num_tokens, np.repeat(seqs, counts)
    tokens = (np.cumsum(query_lens) - query_lens)[seqs] + offsets
    sizes = np.minimum(num_tokens, query_lens[seqs] - offsets)
    positions = (seq_lens - query_lens)[seqs] + offsets
    tiles = np.stack((tokens, seqs, sizes, positions), 1).astype(np.int32)
    return tiles[np.argsort(-positions, kind="stable")]


def attend_chunks(step: Step, spec: AttentionSpec, layer: int, chunks: Chunks) -> None:
    """Write the chunks' tokens of the step."""
    dim = padded_dim(spec)
    launch(
        prefill_kernel,
        (len(chunks.tiles) * spec.num_kv_heads,),
        *step.arguments,
        spec.scale,
        chunks.tiles,
        **tile_arguments(spec, layer),
        ROWS=chunks.num_rows,
        LARGE_TILE=64 if dim <= 128 else 32,
        num_warps=8 if chunks.num_rows * dim > 64 * 128 else 4,
        num_stages=3 if spec.kv_dtype is spec.dtype else 2,
    )


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table_ptr", "tiles_ptr"]
)
def prefill_kernel(
    q_ptr, numbers_ptr, scales_ptr, table_ptr, slopes_ptr, sinks_ptr, out_ptr, table_stride,
    scale, tiles_ptr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, LARGE_TILE: tl.constexpr,
):  # fmt: skip
    """The program tile * NUM_KV_HEADS + key head. Row i is head i % GROUP of token i // GROUP."""
    tile_ptr = tiles_ptr + tl.program_id(0) // NUM_KV_HEADS * 4
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    first_token = tl.load(tile_ptr).to(tl.int64)
    table_ptr += tl.load(tile_ptr + 1).to(tl.int64) * table_stride
    num_tokens, position = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = tokens < num_tokens
    within = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    # Rows of no token see what the last token sees.
    query_positions = position + tl.minimum(tokens, num_tokens - 1)
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    token_at = (first_token + tokens)[:, None] * (NUM_KV_HEADS * HEAD_DIM)
    q = tl.load(q_ptr + token_at * (GROUP + 2) + places, within, 0.0)
    q, scales = to_factors(q, scale, FORMAT)
    slopes = None if slopes_ptr is None else tl.load(slopes_ptr + heads)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        most = tl.load(sinks_ptr + heads) * LOG2_E
    total = tl.where(most > float("-inf"), 1.0, 0.0)
    # Others have too little shared memory, or too few registers beside the products.
    TILE: tl.constexpr = (
        LARGE_TILE if has_much_shared_memory() else min(LARGE_TILE, 4096 // PADDED_DIM)
    )
    last = position + num_tokens
    first, seen_from = 0, 0
    if WINDOW != 0:
        first = tl.maximum(position + 1 - WINDOW, 0)
        seen_from = tl.maximum(last - WINDOW, 0)
    # fmt: off
    acc, most, total = add_keys(
        most, total, q, scales, query_positions, slopes, first, last, seen_from, position + 1,
        numbers_ptr, scales_ptr, table_ptr, kv_head,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SOFT_CAP, FORMAT, WINDOW, TILE,
    )
    # fmt: on
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token_at * GROUP + places, out, within)
