"""Keys and values out of the cache into panels, where products with bf16 rows take them.

Those of 8 bits are widened row by row on the way, exactly. What they are times stays apart: a key's
scale is a factor of its column of scores, a value's of its column of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pagoda_kernels.cpu.compiled import Array, address_of, compiled, prefetch, row_of
from pagoda_kernels.cpu.formats import widen_to_bf16
from pagoda_kernels.cpu.panels import (
    GROUP_SIZE,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    empty_panels,
    interleave_group,
    transpose_panel,
)


class PackedKeys(NamedTuple):
    """A thread's own memory for some keys and values of one head."""

    keys: Array
    """Panels of GROUP_SIZE keys."""
    values: Array
    """Panels of as many values as there may be."""
    key_scales: Array
    """fp32, of as many keys; not written where the dtype has none."""
    value_scales: Array
    wide: Array
    """[GROUP_SIZE, 2, head_dim] bf16: keys and values that were widened."""
    addresses: Array
    """[GROUP_SIZE] int64, of keys."""


@compiled
def empty_packed_keys(most_keys: int, head_dim: int, is_scaled: bool) -> Any:
    """Inside a kernel."""
    most_wide = GROUP_SIZE if is_scaled else 0
    return PackedKeys(
        empty_panels(GROUP_SIZE * head_dim),
        empty_panels(most_keys * head_dim),
        np.empty(most_keys, np.float32),
        np.empty(most_keys, np.float32),
        np.empty((most_wide, 2, head_dim), np.uint16),
        np.empty(GROUP_SIZE, np.int64),
    )


@compiled
def pack_group(
    packed: Any,
    cache: Array,
    scales: Any,
    unit: Any,
    num_kv_heads: int,
    head: int,
    slots: Array,
    index: int,
    num_groups: int,
) -> None:
    """Keys and values at GROUP_SIZE slots, the last one repeated where there are fewer.

    Slots that nobody wrote are never read.

    Args:
        cache: [num_slots * 2 * num_kv_heads, head_dim] of any of VIEWS that bf16 holds exactly.
        scales: [num_slots * 2 * num_kv_heads] fp32, or None.
        unit: of the cache's dtype: see `pagoda_kernels.cpu.formats.UNITS`.
        index: of the num_groups whose values stay packed.
    """
    addresses, wide = packed.addresses, packed.wide
    key_scales, value_scales = packed.key_scales, packed.value_scales
    head_dim = cache.shape[1]
    from_key_to_value = 2 * head_dim * (num_kv_heads if scales is None else 1)
    for i in range(GROUP_SIZE):
        row = slots[min(i, slots.size - 1)] * 2 * num_kv_heads + head
        if scales is None:
            addresses[i] = address_of(row_of(cache, row))
        else:
            widen_to_bf16(row_of(cache, row), wide[i, 0])
            widen_to_bf16(row_of(cache, row + num_kv_heads), wide[i, 1])
            addresses[i] = address_of(wide) + 4 * head_dim * i
            key_scales[index * GROUP_SIZE + i] = scales[row] * unit
            value_scales[index * GROUP_SIZE + i] = scales[row + num_kv_heads] * unit
    _pack_keys(addresses, head_dim, address_of(packed.keys))
    values_at = address_of(packed.values) + index * GROUP_SIZE // 2 * STEP_BYTES
    stride = num_groups * GROUP_SIZE // 2 * STEP_BYTES
    _pack_values(addresses, from_key_to_value, head_dim, values_at, stride)


@compiled
def ask_for(cache: Array, num_kv_heads: int, head: int, slot: int) -> None:
    """A slot's key and value, before they are packed."""
    row_bytes = cache.shape[1] * cache.itemsize
    row = slot * 2 * num_kv_heads + head
    prefetch(address_of(cache) + row * row_bytes, row_bytes)
    prefetch(address_of(cache) + (row + num_kv_heads) * row_bytes, row_bytes)


@compiled
def _pack_keys(addresses: Array, head_dim: int, to: int) -> None:
    """A group of panels whose columns are keys."""
    for panel in range(2):
        some = address_of(addresses) + 8 * panel * PANEL_SIZE
        for offset in range(0, 2 * head_dim, VECTOR_BYTES):
            target = to + panel * VECTOR_BYTES + offset // 4 * STEP_BYTES
            transpose_panel(some, offset, target, STEP_BYTES)


@compiled
def _pack_values(addresses: Array, offset: int, head_dim: int, to: int, stride: int) -> None:
    """The same keys' values as GROUP_SIZE / 2 steps of panels whose columns are numbers of a head.

    Args: stride: bytes from a group of panels to the next.
    """
    for column in range(head_dim // GROUP_SIZE):
        at, target = offset + 2 * column * GROUP_SIZE, to + column * stride
        for pair in range(GROUP_SIZE // 2):
            even, odd = addresses[2 * pair] + at, addresses[2 * pair + 1] + at
            interleave_group(even, odd, target + pair * STEP_BYTES)
