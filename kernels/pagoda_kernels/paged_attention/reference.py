"""The specification of paged_attention in plain torch, one sequence at a time, in fp32."""

from __future__ import annotations

import torch

from pagoda_kernels.paged_attention.metadata import AttentionMetadata


def paged_attention_reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """See `pagoda_kernels.paged_attention.paged_attention`; nothing is checked here."""
    block_size = kv_cache.shape[1]
    group_size = q.shape[1] // kv_cache.shape[3]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts = metadata.query_start_loc.tolist()
    for seq, seq_len in enumerate(metadata.seq_lens.tolist()):
        first, last = starts[seq], starts[seq + 1]
        num_blocks = -(-seq_len // block_size)
        blocks = metadata.block_table[seq, :num_blocks].long()
        kv = kv_cache[blocks].flatten(0, 1)[:seq_len].float()
        keys, values = kv.repeat_interleave(group_size, dim=2).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), keys) * scale
        key_positions = torch.arange(seq_len, device=q.device)
        query_positions = key_positions[seq_len - (last - first) :, None]
        visible = key_positions <= query_positions
        if sliding_window:
            visible &= key_positions > query_positions - sliding_window
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)
    return out
