"""Between a layer's q, k, v product and its attention: norms of heads, rotation, the KV cache."""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.rotate_and_store import ROTATE_AND_STORE
from pagoda_kernels.kv_cache import LARGEST, LEAST, KVCache
from pagoda_kernels.launch import uses_triton
from pagoda_kernels.rotate_and_store.reference import rotate_and_store_reference


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: KVCache,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    norm_floor: torch.Tensor | None = None,
) -> None:
    """Norm and rotate the heads of q and k in place, and write k and v into the cache.

    Args:
        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], contiguous: the heads of q, of k,
            of v. What is left in the heads of k is not defined.
        cos, sin: [num_tokens, 1, rotary_dim] fp32, contiguous: two halves of the same numbers, but
            that sin is negated in its first half. What a head has beyond rotary_dim dimensions is
            not rotated.
        kv_cache: of qkv's dtype or of 8 bits, contiguous.
        slot_mapping: [num_tokens] int64: a token goes to block slot // block_size, to its place
            slot % block_size. Slots are distinct, except in block 0, which nobody reads.
        norm_weight: [num_heads + num_kv_heads, head_dim] fp32; None: no norm.
        norm_floor: [] fp32; see `pagoda_kernels.norm.RMSNormWeights`.
    Raises: ValueError: shapes, dtypes or layouts do not agree. IndexError: a slot is outside the
        cache; a GPU does not store such a token.
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    angles = (num_tokens, 1, cos.shape[-1])
    if cos.shape != angles or sin.shape != angles or cos.dtype is not torch.float32:
        raise ValueError(f"cos and sin must be {list(angles)} fp32; cos is {list(cos.shape)}.")
    if angles[2] > head_dim or angles[2] % 2:
        raise ValueError(f"rotary_dim is {angles[2]}; it must be even and at most {head_dim}.")
    numbers = kv_cache.numbers
    if numbers.dtype not in (qkv.dtype, *LARGEST) or numbers.shape[4] != head_dim:
        raise ValueError("qkv and kv_cache must agree in dtype and head_dim.")
    if slot_mapping.shape != (num_tokens,) or slot_mapping.dtype is not torch.int64:
        raise ValueError(f"slot_mapping must be int64 [{num_tokens}].")
    heads = (num_all_heads - numbers.shape[3], head_dim)
    if norm_weight is not None and norm_weight.shape != heads:
        raise ValueError(f"norm_weight is {list(norm_weight.shape)}; it must be {list(heads)}.")
    if not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("qkv, cos and sin must be contiguous.")
    if (norm_weight is None) != (norm_floor is None):
        raise ValueError("norm_weight and norm_floor belong together.")
    if uses_triton(qkv.device):
        from pagoda_kernels.rotate_and_store.kernel import rotate_and_store_triton

        rotate_and_store_triton(qkv, cos, sin, kv_cache, slot_mapping, norm_weight, norm_floor)
        return
    dtypes = qkv.dtype, numbers.dtype
    if qkv.device.type != "cpu" or dtypes not in ROTATE_AND_STORE:
        rotate_and_store_reference(qkv, cos, sin, kv_cache, slot_mapping, norm_weight, norm_floor)
        return
    ROTATE_AND_STORE[dtypes](
        qkv,
        cos,
        sin,
        numbers,
        kv_cache.scales if kv_cache.scales is not None else 0,
        slot_mapping,
        norm_weight if norm_weight is not None else 0,
        norm_floor if norm_floor is not None else 0,
        num_tokens,
        num_all_heads,
        numbers.shape[3],
        head_dim,
        angles[2],
        numbers.shape[0] * numbers.shape[1],
        LARGEST.get(numbers.dtype, 0.0),
        LEAST,
    )
