"""The specification of rotate_and_store in plain torch."""

from __future__ import annotations

import torch

from pagoda_kernels.kv_cache import KVCache, store_reference
from pagoda_kernels.norm.reference import to_unit_norm


def rotate_and_store_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: KVCache,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_floor: torch.Tensor | None,
) -> None:
    """See `pagoda_kernels.rotate_and_store.rotate_and_store`."""
    num_kv_heads = kv_cache.numbers.shape[3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    qk = qkv[:, : num_heads + num_kv_heads]
    if norm_weight is not None and norm_floor is not None:
        qk = to_unit_norm(qk, norm_floor).mul_(norm_weight)
    rotary_dim = cos.shape[-1]
    qkv[:, : num_heads + num_kv_heads] = qk
    qkv[:, : num_heads + num_kv_heads, :rotary_dim] = apply_rotary(qk[..., :rotary_dim], cos, sin)
    kv = qkv[:, num_heads:].view(len(qkv), 2, num_kv_heads, qkv.shape[2])
    store_reference(kv_cache, slot_mapping, kv)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [num_tokens, num_heads, rotary_dim], rotated by each token's angles; fp32."""
    swapped = torch.roll(x, x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(swapped, sin)
