"""rotate_and_store on a CPU, in one call: see `pagoda_kernels.cpu.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import Array, Kernel, compiled, copy, row_of, sum_of_squares
from pagoda_kernels.cpu.formats import (
    KV_DTYPES,
    VIEWS,
    floats,
    int64s,
    is_common,
    narrow,
    quantize,
    widen,
)
from pagoda_kernels.kv_cache import LARGEST


def _make_kernel(dtype: torch.dtype, kv_dtype: torch.dtype) -> Kernel:
    view, kv_view, is_scaled = VIEWS[dtype], VIEWS[kv_dtype], kv_dtype in LARGEST

    def rotate_and_store(
        qkv_at: int,
        cos_at: int,
        sin_at: int,
        cache_at: int,
        scales_at: int,
        slots_at: int,
        weight_at: int,
        floor_at: int,
        num_tokens: int,
        num_all_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        num_slots: int,
        largest: float,
        least: float,
    ) -> None:
        num_heads = num_all_heads - 2 * num_kv_heads
        qkv = view(qkv_at, (num_tokens, num_all_heads, head_dim))
        cos = floats(cos_at, (num_tokens, rotary_dim))
        sin = floats(sin_at, (num_tokens, rotary_dim))
        cache = kv_view(cache_at, (num_slots * 2 * num_kv_heads, head_dim))
        scales = floats(scales_at, (num_slots * 2 * num_kv_heads,))
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
                if weight_at != 0:
                    _norm(x, weight[head], floor[0])
                _rotate(x, cos[token], sin[token], rotated)
                if is_scaled or head < num_heads:
                    narrow(rotated, qkv[token, head])
                else:
                    row = slot * 2 * num_kv_heads + head - num_heads
                    narrow(rotated, row_of(cache, row))
            if is_scaled:
                for i in range(2 * num_kv_heads):
                    widen(qkv[token, num_heads + i], x)
                    row = slot * 2 * num_kv_heads + i
                    scales[row] = quantize(x, row_of(cache, row), largest, least)
            else:
                for head in range(num_kv_heads):
                    row = (slot * 2 + 1) * num_kv_heads + head
                    copy(qkv[token, num_heads + num_kv_heads + head], row_of(cache, row))

    variant = f"{dtype} {kv_dtype}"
    return Kernel(rotate_and_store, variant, is_ahead=is_common(dtype, kv_dtype))


@compiled
def _norm(x: Array, weight: Array, floor: Any) -> None:
    factor = np.float32(1) / np.sqrt(sum_of_squares(x) + floor * floor)
    for i in range(x.size):
        x[i] = x[i] * factor * weight[i]


@compiled
def _rotate(x: Array, cos: Array, sin: Array, out: Array) -> None:
    half = cos.size // 2
    for i in range(half):
        out[i] = x[i] * cos[i] + x[i + half] * sin[i]
    for i in range(half):
        out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]
    for i in range(cos.size, x.size):
        out[i] = x[i]


ROTATE_AND_STORE = {dtypes: _make_kernel(*dtypes) for dtypes in KV_DTYPES}
"""The kernel for each dtype and that of its keys and values."""
