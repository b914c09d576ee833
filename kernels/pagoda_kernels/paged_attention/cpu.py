"""Paged attention on a CPU: gather by slot, then torch's fused attention.

Decode rows are attended to in buckets of similar length, so the work in Python does not grow with
the number of requests. What to gather is planned once a step (`AttentionMetadata.plans`) and used
by all layers with the same sliding window.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagoda_kernels.paged_attention.metadata import AttentionMetadata


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
    _, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[3]
    group_size = num_heads // num_kv_heads
    slots = kv_cache.flatten(0, 1)
    out = torch.zeros(q.shape, dtype=q.dtype)
    for bucket in plan.buckets:
        rows = bucket.last - bucket.first
        gathered = metadata.buffer.rows(len(bucket.slots), slots)
        torch.index_select(slots, 0, bucket.slots, out=gathered)
        kv = gathered.view(rows, -1, 2, num_kv_heads, head_dim)
        # The query heads that share a key head stand where query tokens usually stand.
        attended = scaled_dot_product_attention(
            q[bucket.first : bucket.last].view(rows, num_kv_heads, group_size, head_dim),
            kv[:, :, 0].transpose(1, 2),
            kv[:, :, 1].transpose(1, 2),
            attn_mask=bucket.mask,
            scale=scale,
        )
        out[bucket.first : bucket.last] = attended.reshape(rows, num_heads, head_dim)
    for single in plan.singles:
        kv = slots.index_select(0, single.slots)
        num_queries = single.last - single.first
        # Queries stand in the place of the batch, which torch computes one by one.
        shape = (num_queries, num_kv_heads, kv.shape[0], head_dim)
        attended = scaled_dot_product_attention(
            q[single.first : single.last].view(num_queries, num_kv_heads, group_size, head_dim),
            kv[:, 0].transpose(0, 1).expand(shape),
            kv[:, 1].transpose(0, 1).expand(shape),
            attn_mask=single.mask,
            scale=scale,
        )
        out[single.first : single.last] = attended.reshape(num_queries, num_heads, head_dim)
    for prefill in plan.prefills:
        kv = slots.index_select(0, prefill.slots)
        # Key heads stand in the place of the batch, so sharing one among a group is a view.
        shape = (num_kv_heads, group_size, kv.shape[0], head_dim)
        queries = q[prefill.first : prefill.last].view(-1, num_kv_heads, group_size, head_dim)
        attended = scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),
            kv[:, 0].transpose(0, 1)[:, None].expand(shape),
            kv[:, 1].transpose(0, 1)[:, None].expand(shape),
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=scale,
        )
        out[prefill.first : prefill.last] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out
