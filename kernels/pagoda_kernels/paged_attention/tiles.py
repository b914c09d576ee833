"""What both kernels do with a tile of keys: read it by the block table, score it, add its values.

A tile's keys are at consecutive positions, whatever the size of blocks. Rows are query heads of
one key head: of one token, or of several.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language import target_info

from pagoda_kernels.kv_cache import FORMATS, KVCache
from pagoda_kernels.paged_attention.backend import AttentionSpec
from pagoda_kernels.paged_attention.widen import unit, widen

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Step(NamedTuple):
    """What both kernels are given of a layer's step."""

    heads: torch.Tensor
    """[num_tokens, num_heads + 2 * num_kv_heads, head_dim], contiguous: queries are read of it."""
    kv_cache: KVCache
    block_table: torch.Tensor
    """[num_seqs, max_blocks] int32."""
    slopes: torch.Tensor | None
    """[num_heads] fp32."""
    sinks: torch.Tensor | None
    """[num_heads] fp32."""
    out: torch.Tensor
    """[num_tokens, num_heads, head_dim]: each kernel writes its tokens'."""

    @property
    def arguments(self) -> tuple[torch.Tensor | int | None, ...]:
        """The first of both kernels'."""
        numbers, scales = self.kv_cache
        if scales is not None:
            # Two numbers of 8 bits each.
            numbers = numbers.view(torch.int16)
        table = self.block_table
        others = (table, self.slopes, self.sinks, self.out, table.stride(0))
        return self.heads, numbers, scales, *others


@triton.jit
def add_keys(
    most, total, q, scales, query_positions, slopes,
    first, last, seen_from, seen_until, numbers_ptr, scales_ptr, table_ptr, kv_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SOFT_CAP: tl.constexpr, FORMAT: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of softmax over the keys at positions first … last - 1, of blocks in table_ptr.

    most, total [ROWS]: largest score and sum of weights before; weights are powers of 2, scores the
        numbers in their exponents.
    q [ROWS, PADDED_DIM], scales [ROWS]: see `to_factors`; query_positions [ROWS]: a row sees keys
        at its position and before it, and above its position - WINDOW (0: all); slopes [ROWS], or
        None.
    seen_from, seen_until: all rows see the keys at these positions, the last exclusive.
    Returns: [ROWS, PADDED_DIM] sum of weights times values; most and total with these keys.
    """
    # Numbers of 8 bits are read as words of two, of which products take one after the other.
    PER_WORD: tl.constexpr = 1 if FORMAT is None else 2
    ROWS: tl.constexpr = q.shape[0]
    WORDS: tl.constexpr = q.shape[1] // PER_WORD
    HEAD_WORDS: tl.constexpr = HEAD_DIM // PER_WORD
    words, offsets = tl.arange(0, WORDS), tl.arange(0, TILE)
    acc = tl.full([ROWS, WORDS], 0.0, tl.float32)
    if FORMAT is not None:
        low_q, high_q = tl.split(tl.reshape(q, [ROWS, WORDS, 2]))
        high_acc = acc
    is_plain: tl.constexpr = SOFT_CAP == 0.0 and slopes is None
    # Without a change in between, one factor stands for the scale and for e as a power of 2.
    factors = scales * LOG2_E if is_plain else tl.full([scales.shape[0]], LOG2_E, tl.float32)
    # Words of a token; unsigned positions are parted by shifts.
    STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_WORDS
    numbers_ptr += kv_head * HEAD_WORDS
    positions = first + offsets
    blocks = tl.load(table_ptr + positions.to(tl.uint32) // BLOCK_SIZE, positions < last, 0)
    largest = 0.0
    for start in tl.range(first, last, TILE):
        positions = start + offsets
        inside = positions < last
        places = (positions.to(tl.uint32) % BLOCK_SIZE).to(tl.int32)
        at = blocks.to(tl.int64) * (BLOCK_SIZE * STRIDE) + places * STRIDE
        at = numbers_ptr + at[:, None] + words[None, :]
        # Unused slots may hold NaN, which 0 times it would stay: they are not loaded.
        within = inside[:, None]
        if HEAD_WORDS != WORDS:
            within = within & (words < HEAD_WORDS)[None, :]
        keys = tl.load(at, within, 0)
        values = tl.load(at + NUM_KV_HEADS * HEAD_WORDS, within, 0)
        if FORMAT is not None:
            heads = blocks.to(tl.int64) * (BLOCK_SIZE * 2 * NUM_KV_HEADS)
            of_keys = scales_ptr + heads + (places * (2 * NUM_KV_HEADS) + kv_head)
            key_scales = tl.load(of_keys, inside, 0.0)
            value_scales = tl.load(of_keys + NUM_KV_HEADS, inside, 0.0)
        # Of the next tile, so that its keys are asked for without waiting for the table.
        after = positions + TILE
        blocks = tl.load(table_ptr + after.to(tl.uint32) // BLOCK_SIZE, after < last, 0)
        if FORMAT is None:
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        else:
            low, high = widen(keys, q.dtype, FORMAT)
            scores = tl.dot(low_q, tl.trans(low), input_precision="ieee")
            scores = tl.dot(high_q, tl.trans(high), scores, input_precision="ieee")
            scores = scores * (key_scales * unit(FORMAT))[None, :]
        if not is_plain:
            scores = scores * scales[:, None]
        if SOFT_CAP != 0.0:
            # tanh(x) = 1 - 2 / (1 + e^2x), which is right where e^2x is 0 or infinite, too.
            grown = tl.exp2(scores * (2.0 * LOG2_E / SOFT_CAP))
            scores = SOFT_CAP - 2.0 * SOFT_CAP / (1.0 + grown)
        if slopes is not None:
            scores += slopes[:, None] * (positions[None, :] - query_positions[:, None])
        if (start < seen_from) | (start + TILE > seen_until):
            distances = query_positions[:, None] - positions[None, :]
            if WINDOW == 0:
                scores = tl.where(distances >= 0, scores, float("-inf"))
            else:
                is_seen = (distances >= 0) & (distances < WINDOW)
                scores = tl.where(is_seen, scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1) * factors)
        # A row that has seen no key yet has a largest score of -inf.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores * factors[:, None] - base[:, None])
        past = tl.exp2(most - base)
        total = total * past + tl.sum(weights, 1)
        if FORMAT is not None:
            # As parts of the largest, since fp16 holds no small products of weights and scales.
            grown = tl.maximum(largest, tl.max(value_scales, 0))
            weights = weights * (value_scales * (1.0 / grown))[None, :]
            past = past * (largest / grown)
            largest = grown
        weights, past = weights.to(q.dtype), past[:, None]
        if FORMAT is None:
            acc = tl.dot(weights, values, acc * past, input_precision="ieee")
        else:
            low, high = widen(values, q.dtype, FORMAT)
            acc = tl.dot(weights, low, acc * past, input_precision="ieee")
            high_acc = tl.dot(weights, high, high_acc * past, input_precision="ieee")
        most = new
    if FORMAT is not None:
        acc = tl.reshape(tl.join(acc, high_acc), [ROWS, 2 * WORDS])
        acc = acc * (largest * unit(FORMAT))
    return acc, most, total


@triton.constexpr_function
def has_much_shared_memory() -> bool:
    """Whether this is Hopper or a Blackwell for servers, whose products take tiles from there.

    Interpreted kernels do as on these.
    """
    target = target_info.current_target()
    return target is None or (target.backend == "cuda" and 90 <= target.arch < 120)


@triton.jit
def to_factors(q, scale, FORMAT: tl.constexpr):
    """q as products take it, and of each row what scores are to be multiplied by.

    Numbers of 8 bits are widened to fp16 in fewer steps than to bf16, and exactly; queries fit into
    it once they are divided by their row's largest. Weights are finer in fp16, too.
    """
    if FORMAT is not None and q.dtype != tl.float32:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        return (wide / largest[:, None]).to(tl.float16), largest * scale
    else:
        return q, tl.full([q.shape[0]], 0.0, tl.float32) + scale


def tile_arguments(spec: AttentionSpec, layer: int) -> dict[str, Any]:
    """The constants of `add_keys` that a layer's launches have in common."""
    return {
        "NUM_KV_HEADS": spec.num_kv_heads,
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "HEAD_DIM": spec.head_dim,
        "PADDED_DIM": padded_dim(spec),
        "BLOCK_SIZE": spec.block_size,
        "SOFT_CAP": spec.soft_cap,
        "FORMAT": FORMATS.get(spec.kv_dtype),
        "WINDOW": spec.windows[layer],
    }


def padded_dim(spec: AttentionSpec) -> int:
    """Products are of powers of 2, from 16 on; what is beyond head_dim is not read."""
    least = 16 if spec.kv_dtype is spec.dtype else 32
    return max(least, 1 << (spec.head_dim - 1).bit_length())
