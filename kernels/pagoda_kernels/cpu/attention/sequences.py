"""The sequences of one step, and where in the cache their keys and values are."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.attention.slots import list_slots


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
        """[sum of counts] int64: of each sequence the slots of its newest tokens, oldest first."""
        lasts = self.seq_lens[seqs]
        table = self._block_table[seqs]
        return list_slots(table, self._block_size, self._num_blocks, lasts - counts, lasts)
