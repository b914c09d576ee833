"""rotate_and_store as a Triton kernel: a program for some heads of a token, of q or of k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.kv_cache import FORMATS, LARGEST, LEAST, KVCache
from pagoda_kernels.launch import launch

# Numbers of a program: 16 for each thread of two warps, so that one load brings 16 bytes of bf16.
_NUMBERS, _NUM_WARPS = 1024, 2


def rotate_and_store_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: KVCache,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_floor: torch.Tensor | None,
) -> None:
    """See `pagoda_kernels.rotate_and_store.rotate_and_store`."""
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_blocks, block_size, _, num_kv_heads, _ = kv_cache.numbers.shape
    num_heads, rotary_dim = num_all_heads - 2 * num_kv_heads, cos.shape[-1]
    half, rest = triton.next_power_of_2(max(1, rotary_dim // 2)), head_dim - rotary_dim
    rest = triton.next_power_of_2(rest) if rest else 0
    most_heads = triton.next_power_of_2(max(num_heads, 2 * num_kv_heads))
    heads = min(most_heads, max(1, _NUMBERS // triton.next_power_of_2(2 * half + rest)))
    dtype = kv_cache.numbers.dtype
    launch(
        _rotate_and_store_kernel,
        [num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(2 * num_kv_heads, heads)],
        qkv,
        cos,
        sin,
        kv_cache.tensors[0],
        kv_cache.scales,
        slot_mapping,
        norm_weight,
        norm_floor,
        num_heads,
        num_kv_heads,
        num_blocks * block_size * 2 * num_kv_heads,
        FORMAT=FORMATS.get(dtype),
        LARGEST=LARGEST.get(dtype),
        LEAST=LEAST,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        HEADS=heads,
        HALF=half,
        REST=rest,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, numbers_ptr, scales_ptr, slots_ptr, weight_ptr, floor_ptr,
    num_heads, num_kv_heads, num_rows,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # Heads of q, or of k and v, never both: what is done with them in the end differs.
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_query_tiles = tl.cdiv(num_heads, HEADS)
    is_query = tile < num_query_tiles
    first = tl.where(is_query, tile * HEADS, num_heads + (tile - num_query_tiles) * HEADS)
    end = tl.where(is_query, num_heads, num_heads + 2 * num_kv_heads)
    heads = first + tl.arange(0, HEADS)[:, None]
    is_rotated = heads < num_heads + num_kv_heads

    # A head is three pieces: the first numbers of the pairs, the second ones, and the rest.
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    pairs = tl.arange(0, HALF)[None, :]
    of_pairs = (heads < end) & (pairs < PAIRS)
    qkv_ptr += (token * (num_heads + 2 * num_kv_heads) + heads) * HEAD_DIM
    a = tl.load(qkv_ptr + pairs, of_pairs, 0.0).to(tl.float32)
    b = tl.load(qkv_ptr + PAIRS + pairs, of_pairs, 0.0).to(tl.float32)
    if REST:
        others = ROTARY_DIM + tl.arange(0, REST)[None, :]
        of_others = (heads < end) & (others < HEAD_DIM)
        c = tl.load(qkv_ptr + others, of_others, 0.0).to(tl.float32)

    if weight_ptr is not None:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            squares += tl.sum(c * c, 1)
        floor = tl.load(floor_ptr)
        factor = tl.where(is_rotated, tl.rsqrt(squares + floor * floor)[:, None], 1.0)
        weight_ptr += heads * HEAD_DIM
        a *= factor * tl.load(weight_ptr + pairs, of_pairs & is_rotated, 1.0)
        b *= factor * tl.load(weight_ptr + PAIRS + pairs, of_pairs & is_rotated, 1.0)
        if REST:
            c *= factor * tl.load(weight_ptr + others, of_others & is_rotated, 1.0)

    # cos is the same in both halves, sin too but for its sign.
    angles = token * ROTARY_DIM + pairs
    cos = tl.load(cos_ptr + angles, pairs < PAIRS, 0.0)
    sin = tl.load(sin_ptr + PAIRS + angles, pairs < PAIRS, 0.0)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    a = tl.where(is_rotated, rotated_a, a).to(DTYPE)
    b = tl.where(is_rotated, rotated_b, b).to(DTYPE)
    if REST:
        c = c.to(DTYPE)

    if is_query:
        tl.store(qkv_ptr + pairs, a, of_pairs)
        tl.store(qkv_ptr + PAIRS + pairs, b, of_pairs)
        if REST:
            tl.store(qkv_ptr + others, c, of_others)
    else:
        # Of the cache, of all slots' heads.
        rows = tl.load(slots_ptr + token) * 2 * num_kv_heads + heads - num_heads
        is_stored = (rows >= 0) & (rows < num_rows)
        if FORMAT is None:
            at = numbers_ptr + rows * HEAD_DIM
            tl.store(at + pairs, a, is_stored & of_pairs)
            tl.store(at + PAIRS + pairs, b, is_stored & of_pairs)
            if REST:
                tl.store(at + others, c, is_stored & of_others)
        else:
            most = tl.maximum(_largest(a), _largest(b))
            if REST:
                most = tl.maximum(most, _largest(c))
            most = tl.maximum(most, LEAST)
            factor = tl.div_rn(LARGEST, most)
            tl.store(scales_ptr + rows, tl.div_rn(most, LARGEST), is_stored & (heads < end))
            at = numbers_ptr + rows * HEAD_DIM
            tl.store(at + pairs, encode(a, factor, LARGEST, FORMAT), is_stored & of_pairs)
            tl.store(at + PAIRS + pairs, encode(b, factor, LARGEST, FORMAT), is_stored & of_pairs)
            if REST:
                tl.store(at + others, encode(c, factor, LARGEST, FORMAT), is_stored & of_others)


@triton.jit
def _largest(x):
    """Of each row the largest magnitude, as a column."""
    return tl.max(tl.abs(x.to(tl.float32)), 1)[:, None]


@triton.jit
def encode(x, factor, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """The bits of numbers times a factor, rounded to the nearest of a format, half to even."""
    x = tl.clamp(x.to(tl.float32) * factor, -LARGEST, LARGEST)
    if FORMAT == "int8":
        # There are no fractions between 2²³ and 2²⁴.
        MAGIC: tl.constexpr = 1.5 * 2**23
        return ((x + MAGIC) - MAGIC).to(tl.int8).to(tl.uint8, bitcast=True)
    elif FORMAT == "e4m3":
        return _encode_fp8(x, 3, 7)
    else:
        tl.static_assert(FORMAT == "e5m2")
        return _encode_fp8(x, 2, 15)


@triton.jit
def _encode_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """By integers, as not every GPU converts; x is at most the format's largest number."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # A half is added in the bits that go, a little less if that would make an even number odd.
    SHIFT: tl.constexpr = 23 - MANTISSA
    is_odd = (magnitude >> SHIFT) & 1
    rounded = (magnitude + (2 ** (SHIFT - 1) - 1) + is_odd) >> SHIFT
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the normal numbers steps are those of fp32 at a certain size.
    EXPONENT: tl.constexpr = 24 - BIAS - MANTISSA
    steps = (tl.abs(x) + 2.0**EXPONENT).to(tl.uint32, bitcast=True) - ((127 + EXPONENT) << 23)
    code = tl.where(magnitude < ((128 - BIAS) << 23), steps, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
