"""rotate_and_store for bf16 on a CPU, in one call: see `pagoda_kernels.cpu.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import (
    Array,
    bf16_bits,
    compiled,
    copy,
    floats,
    int64s,
    kernel,
    narrow,
    sum_of_squares,
    widen,
)


def rotate_and_store_cpu(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_floor: torch.Tensor | None,
) -> None:
    """See `pagoda_kernels.rotate_and_store.rotate_and_store`; qkv is bf16."""
    has_norm = norm_weight is not None and norm_floor is not None
    _run(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        norm_weight.data_ptr() if norm_weight is not None else 0,
        norm_floor.data_ptr() if norm_floor is not None else 0,
        has_norm,
        len(qkv),
        qkv.shape[1],
        kv_cache.shape[3],
        kv_cache.shape[4],
        kv_cache.shape[0] * kv_cache.shape[1],
    )


@kernel
def _run(
    qkv_at: int,
    cos_at: int,
    sin_at: int,
    cache_at: int,
    slots_at: int,
    weight_at: int,
    floor_at: int,
    has_norm: bool,
    num_tokens: int,
    num_all_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_slots: int,
) -> None:
    num_heads = num_all_heads - 2 * num_kv_heads
    qkv = bf16_bits(qkv_at, (num_tokens, num_all_heads, head_dim))
    cos, sin = floats(cos_at, (num_tokens, head_dim)), floats(sin_at, (num_tokens, head_dim))
    cache = bf16_bits(cache_at, (num_slots, 2, num_kv_heads, head_dim))
    slots = int64s(slots_at, (num_tokens,))
    weight = floats(weight_at, (num_heads + num_kv_heads, head_dim))
    floor = floats(floor_at, (1,))
    x, rotated = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for token in range(num_tokens):
        slot = slots[token]
        if slot < 0 or slot >= num_slots:
            raise IndexError("a slot outside the cache")
        for head in range(num_heads + num_kv_heads):
            widen(qkv[token, head], x)
            if has_norm:
                _norm(x, weight[head], floor[0])
            _rotate(x, cos[token], sin[token], rotated)
            is_query = head < num_heads
            target = qkv[token, head] if is_query else cache[slot, 0, head - num_heads]
            narrow(rotated, target)
        for head in range(num_kv_heads):
            copy(qkv[token, num_heads + num_kv_heads + head], cache[slot, 1, head])


@compiled
def _norm(x: Array, weight: Array, floor: Any) -> None:
    factor = np.float32(1) / np.sqrt(sum_of_squares(x) + floor * floor)
    for i in range(x.size):
        x[i] = x[i] * factor * weight[i]


@compiled
def _rotate(x: Array, cos: Array, sin: Array, out: Array) -> None:
    half = x.size // 2
    for i in range(half):
        out[i] = x[i] * cos[i] + x[i + half] * sin[i]
    for i in range(half):
        out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]
