"""Paged attention on a CPU: compiled kernels in bf16, else products of gathered keys and values.

In bf16 decode rows gather nothing (see `walk`), and where the processor multiplies bf16 prompt
chunks neither (see `chunks`). Other decode rows and short prompts are attended to many at a time,
so the work in Python does not grow with their number. What to read is planned once a step
(`AttentionMetadata.plans`) and used by all layers with the same sliding window.

Two batched products and a softmax take less than half of the time of torch's fused attention on a
CPU, whose products are of one sequence and one head at a time. They round the scores to the dtype
of the queries before the softmax, which does not show beside the rounding of keys and queries.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagoda_kernels.cpu.attention.chunks import attend_chunks
from pagoda_kernels.cpu.attention.plan import (
    DecodeBucket,
    PrefillBatch,
    PrefillGather,
    SingleQueries,
)
from pagoda_kernels.cpu.attention.walk import walk
from pagoda_kernels.paged_attention.metadata import AttentionMetadata, GatherBuffer

_FLOATS = torch.empty(1, dtype=torch.float32)


def paged_attention_cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """See `pagoda_kernels.paged_attention.paged_attention`; nothing is checked here."""
    plan = metadata.plans[sliding_window]
    out = torch.empty(q.shape, dtype=q.dtype)
    out[metadata.num_tokens :] = 0
    if plan.walk is not None:
        rows = slice(0, len(plan.walk.ends))
        walk(q[rows], kv_cache, plan.walk.slots, plan.walk.ends, scale, out[rows])
    if plan.chunks is not None:
        size = plan.chunks.partial_size
        numbers = metadata.buffer.rows(plan.chunks.num_partials * kv_cache.shape[3] * size, _FLOATS)
        attend_chunks(q, kv_cache, plan.chunks, scale, numbers.view(-1, size), out)
    for bucket in plan.buckets:
        _attend_bucket(q, kv_cache, bucket, metadata.buffer, scale, out)
    for single in plan.singles:
        _attend_singly(q, kv_cache, single, scale, out)
    for batch in plan.batches:
        _attend_batch(q, kv_cache, batch, metadata.buffer, scale, out)
    for prefill in plan.prefills:
        _attend_prefill(q, kv_cache, prefill, metadata.buffer, scale, out)
    return out


def _attend_bucket(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    bucket: DecodeBucket,
    buffer: GatherBuffer,
    scale: float,
    out: torch.Tensor,
) -> None:
    keys, values = _gather(kv_cache, bucket.head_rows, buffer, len(bucket.mask))
    rows = slice(bucket.first, bucket.last)
    # The query heads that share a key head stand where query tokens usually stand.
    queries = q[rows].reshape(len(keys), -1, q.shape[2])
    attended = _attend(queries, keys, values, scale, bucket.mask)
    out[rows] = attended.view(-1, *q.shape[1:])


def _attend_batch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PrefillBatch,
    buffer: GatherBuffer,
    scale: float,
    out: torch.Tensor,
) -> None:
    num_kv_heads, head_dim = kv_cache.shape[3:]
    keys, values = _gather(kv_cache, batch.head_rows, buffer, len(batch.mask))
    num_queries = batch.mask.shape[2]
    gathered = q.index_select(0, batch.tokens)
    grouped = gathered.view(-1, num_queries, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
    by_head = grouped.permute(0, 2, 3, 1, 4)
    queries = by_head.reshape(len(keys), -1, head_dim)
    attended = _attend(queries, keys, values, scale, batch.mask)
    by_token = attended.view(by_head.shape).permute(0, 3, 1, 2, 4)
    out.index_copy_(0, batch.tokens, by_token.reshape(gathered.shape))


def _attend_prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    prefill: PrefillGather,
    buffer: GatherBuffer,
    scale: float,
    out: torch.Tensor,
) -> None:
    num_kv_heads, head_dim = kv_cache.shape[3:]
    keys, values = _gather(kv_cache, prefill.head_rows, buffer, num_kv_heads)
    for block in prefill.blocks:
        tokens, visible = slice(block.first, block.last), slice(block.first_key, block.last_key)
        grouped = q[tokens].view(block.last - block.first, num_kv_heads, -1, head_dim)
        # Those that share a key head: all tokens of the first query head, then of the second.
        by_head = grouped.permute(1, 2, 0, 3)
        attended = _attend(
            by_head.reshape(num_kv_heads, -1, head_dim),
            keys[:, visible],
            values[:, visible],
            scale,
            block.mask,
        )
        out[tokens].view(grouped.shape).copy_(attended.view(by_head.shape).permute(2, 0, 1, 3))


def _gather(
    kv_cache: torch.Tensor, head_rows: torch.Tensor, buffer: GatherBuffer, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [num_heads, num_keys, head_dim]; the buffer's memory."""
    table = kv_cache.view(-1, kv_cache.shape[4])
    gathered = buffer.rows(len(head_rows), table)
    torch.index_select(table, 0, head_rows, out=gathered)
    keys, values = gathered.view(2, num_heads, -1, table.shape[1])
    return keys, values


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """q: [heads, queries, head_dim]; mask: see DecodeBucket, PrefillBatch and PrefillBlock."""
    dtype = _product_dtype(q.dtype)
    if dtype is not q.dtype:
        wide = _attend(q.to(dtype), keys.to(dtype), values.to(dtype), scale, mask.to(dtype))
        return wide.to(q.dtype)
    # With beta=0 the first argument is not read.
    scores = torch.baddbmm(q[..., :1], q, keys.transpose(1, 2), beta=0, alpha=scale)
    num_queries, num_masked = mask.shape[-2:]
    masked = scores.view(len(q), -1, num_queries, scores.shape[2])[..., -num_masked:]
    masked.add_(mask)
    return torch.bmm(scores.softmax(-1), values)


@functools.cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 if torch multiplies matrices of this dtype one number at a time on this CPU."""
    is_fast = dtype is torch.bfloat16 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return dtype if is_fast or dtype is torch.float64 else torch.float32


def _attend_singly(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    single: SingleQueries,
    scale: float,
    out: torch.Tensor,
) -> None:
    kv = kv_cache.flatten(0, 1).index_select(0, single.slots)
    num_keys, _, num_kv_heads, head_dim = kv.shape
    num_queries = single.last - single.first
    # Queries stand in the place of the batch, which torch computes one by one.
    shape = (num_queries, num_kv_heads, num_keys, head_dim)
    attended = scaled_dot_product_attention(
        q[single.first : single.last].view(num_queries, num_kv_heads, -1, head_dim),
        kv[:, 0].transpose(0, 1).expand(shape),
        kv[:, 1].transpose(0, 1).expand(shape),
        attn_mask=single.mask,
        scale=scale,
    )
    out[single.first : single.last] = attended.reshape(num_queries, *q.shape[1:])
