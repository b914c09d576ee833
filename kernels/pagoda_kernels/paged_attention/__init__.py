"""Attend the query tokens of a step over their sequences' paged keys and values."""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.attention.attend import paged_attention_cpu
from pagoda_kernels.cpu.attention.layout import HeadShape
from pagoda_kernels.paged_attention.metadata import AttentionMetadata, GatherBuffer
from pagoda_kernels.paged_attention.reference import paged_attention_reference

__all__ = ["AttentionMetadata", "GatherBuffer", "HeadShape", "paged_attention"]


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of ragged query tokens over a paged KV cache.

    Args:
        q: [num_tokens, num_heads, head_dim], heads contiguous; the query tokens of
            all sequences one after the other. They are the last tokens of their sequences.
        kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim], contiguous, dtype of q;
            it already holds the keys and values of this step. Slots past a sequence's end are
            never read: they may contain anything.
        metadata: the sequences of the step.
        scale: factor on q·k, above 0.
        sliding_window: a query at position p sees positions above p - sliding_window; 0: all.
    Returns: [num_tokens, num_heads, head_dim], dtype of q; rows after the last sequence, which
        are padding, are zero.
    Raises: ValueError: shapes or dtypes do not agree, the scale is not above 0, or the window was
        not planned for.
    Source: Kwon et al., PagedAttention, SOSP 2023, section 4.
    """
    _require_agreement(q, kv_cache, metadata, scale)
    if q.device.type != "cpu":
        return paged_attention_reference(
            q, kv_cache, metadata, scale=scale, sliding_window=sliding_window
        )
    if sliding_window not in metadata.plans:
        raise ValueError(
            f"sliding_window is {sliding_window}; the metadata was built for {set(metadata.plans)}."
        )
    return paged_attention_cpu(q, kv_cache, metadata, scale=scale, sliding_window=sliding_window)


def _require_agreement(
    q: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> None:
    if kv_cache.dim() != 5 or kv_cache.shape[2] != 2:
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)}; "
            "it must be [num_blocks, block_size, 2, num_kv_heads, head_dim]."
        )
    if q.dim() != 3 or q.shape[2] != kv_cache.shape[4] or q.shape[1] % kv_cache.shape[3]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be [num_tokens, num_heads, "
            f"{kv_cache.shape[4]}] with num_heads a multiple of {kv_cache.shape[3]}."
        )
    if q.dtype != kv_cache.dtype:
        raise ValueError(f"q is {q.dtype} and kv_cache is {kv_cache.dtype}; both must agree.")
    heads = (q.shape[1], *kv_cache.shape[3:])
    if heads != metadata.heads or q.dtype != metadata.dtype or len(q) < metadata.num_tokens:
        raise ValueError(
            f"q has {len(q)} tokens in {q.dtype} and the heads are {heads}; the metadata was built "
            f"for {metadata.num_tokens} tokens in {metadata.dtype} and {tuple(metadata.heads)}."
        )
    if scale <= 0.0:
        raise ValueError(f"scale is {scale}; it must be above 0.")
