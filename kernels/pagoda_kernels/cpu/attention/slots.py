"""The cache slots that rows of attention see, and a check of them."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import int32s, int64s, kernel


def list_slots(
    block_table: np.ndarray, block_size: int, firsts: np.ndarray, lasts: np.ndarray
) -> torch.Tensor:
    """[num_keys] int64: the slots of positions firsts[0] … lasts[0] - 1, then of firsts[1] …

    Args:
        block_table: [num_seqs, max_blocks] int32: of each range its blocks.
        firsts, lasts: [num_seqs] int64, contiguous.
    Raises: IndexError if a position has no block in the table.
    """
    table = np.ascontiguousarray(block_table, dtype=np.int32)
    if len(table) != len(firsts) or np.any(lasts > table.shape[1] * block_size):
        raise IndexError("a position without a block")
    slots = torch.empty(int((lasts - firsts).sum()), dtype=torch.int64)
    _fill(
        table.ctypes.data,
        table.shape[1],
        block_size,
        firsts.ctypes.data,
        lasts.ctypes.data,
        len(firsts),
        slots.data_ptr(),
        len(slots),
    )
    return slots


@kernel
def _fill(
    table_at: int,
    max_blocks: int,
    block_size: int,
    firsts_at: int,
    lasts_at: int,
    num_seqs: int,
    slots_at: int,
    num_keys: int,
) -> None:
    table = int32s(table_at, (num_seqs, max_blocks))
    firsts, lasts = int64s(firsts_at, (num_seqs,)), int64s(lasts_at, (num_seqs,))
    slots = int64s(slots_at, (num_keys,))
    index = 0
    for seq in range(num_seqs):
        position = firsts[seq]
        while position < lasts[seq]:
            block = position // block_size
            first, end = block * block_size, min((block + 1) * block_size, lasts[seq])
            base = np.int64(table[seq, block]) * block_size - first
            for i in range(position, end):
                slots[index] = base + i
                index += 1
            position = end


def require_slots(slots: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Raises: IndexError if one of them is outside the cache."""
    _require(slots.data_ptr(), len(slots), kv_cache.shape[0] * kv_cache.shape[1])


@kernel
def _require(slots_at: int, num_keys: int, num_slots: int) -> None:
    slots = int64s(slots_at, (num_keys,))
    for i in range(num_keys):
        if slots[i] < 0 or slots[i] >= num_slots:
            raise IndexError("a slot outside the cache")
