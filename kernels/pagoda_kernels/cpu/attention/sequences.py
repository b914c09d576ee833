"""The sequences of one step, and where in the cache their keys and values are."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import Kernel
from pagoda_kernels.cpu.formats import int32s, int64s


class Sequences:
    """See `pagoda_kernels.paged_attention.AttentionBackend.plan`; starts are their first tokens."""

    def __init__(
        self,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        *,
        block_size: int,
        num_blocks: int,
    ) -> None:
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.starts = np.cumsum(query_lens) - query_lens
        self._block_table, self._block_size = block_table, block_size
        self._num_blocks = num_blocks

    def num_visible(self, seqs: np.ndarray, window: int) -> np.ndarray:
        """[num_seqs]: how many of each one's newest keys any of its query tokens sees."""
        lens: np.ndarray = self.seq_lens[seqs]
        return np.minimum(lens, self.query_lens[seqs] + window - 1) if window else lens

    def newest_slots(self, seqs: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        """[sum of counts] int64: of each sequence the slots of its newest tokens, oldest first.

        Raises: IndexError: a token has no block in the table, or one outside the cache.
        """
        lasts = self.seq_lens[seqs]
        firsts, block_size = lasts - counts, self._block_size
        table = np.ascontiguousarray(self._block_table[seqs], dtype=np.int32)
        if np.any(lasts > table.shape[1] * block_size):
            raise IndexError("a position without a block")
        slots = torch.empty(int(counts.sum()), dtype=torch.int64)
        _fill(
            table.ctypes.data,
            table.shape[1],
            block_size,
            self._num_blocks,
            firsts.ctypes.data,
            lasts.ctypes.data,
            len(firsts),
            slots,
            len(slots),
        )
        return slots


@Kernel
def _fill(
    table_at: int,
    max_blocks: int,
    block_size: int,
    num_blocks: int,
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
            if table[seq, block] < 0 or table[seq, block] >= num_blocks:
                raise IndexError("a block outside the cache")
            base = np.int64(table[seq, block]) * block_size - first
            for i in range(position, end):
                slots[index] = base + i
                index += 1
            position = end
