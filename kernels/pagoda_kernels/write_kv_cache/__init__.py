"""Store the keys and values of a step's tokens in the paged KV cache."""

from __future__ import annotations

import torch

from pagoda_kernels.write_kv_cache.reference import write_kv_cache_reference


def write_kv_cache(kv: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write each token's key and value into its slot, in place.

    Args:
        kv: [num_tokens, 2, num_kv_heads, head_dim], keys at index 0, values at index 1; any strides
            whose last dimension is contiguous.
        kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim], contiguous, dtype of kv.
        slot_mapping: [num_tokens] int64; token i goes to block slot // block_size, offset
            slot % block_size. Slots are distinct, except in block 0, which nobody reads.
    Raises: ValueError: shapes, dtypes or devices do not agree.
    """
    if kv_cache.dim() != 5 or kv_cache.shape[2] != 2:
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)}; "
            "it must be [num_blocks, block_size, 2, num_kv_heads, head_dim]."
        )
    if kv.dim() != 4 or kv.shape[1:] != kv_cache.shape[2:]:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}; "
            f"with this cache it must be [num_tokens, {', '.join(map(str, kv_cache.shape[2:]))}]."
        )
    if kv.dtype != kv_cache.dtype:
        raise ValueError(f"kv is {kv.dtype} and kv_cache is {kv_cache.dtype}; both must agree.")
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != kv.shape[:1]:
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; "
            f"it must be int64 [{kv.shape[0]}]."
        )
    if not kv.device == kv_cache.device == slot_mapping.device:
        raise ValueError("kv, kv_cache and slot_mapping must be on the same device.")
    write_kv_cache_reference(kv, kv_cache, slot_mapping)
