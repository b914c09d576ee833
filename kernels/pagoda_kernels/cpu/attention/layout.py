"""The sequences of one step, and where in the cache their keys and values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.slots import list_slots


class HeadShape(NamedTuple):
    """Of the queries, and of keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The sequences of one step: see `AttentionMetadata`."""

    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    starts: np.ndarray
    block_table: np.ndarray
    block_size: int
    heads: HeadShape
    num_decodes: int
    num_threads: int
    """That the step will be computed by."""

    def slots(self, seq: slice | int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Cache slots of positions ([..., n]) of one sequence, or row by row of some of them."""
        blocks, offsets = np.divmod(positions, self.block_size)
        if isinstance(seq, int):
            table = self.block_table[seq, blocks]
        else:
            table = np.take_along_axis(self.block_table[seq], blocks, axis=1)
        slots: np.ndarray = table.astype(np.int64) * self.block_size + offsets
        return slots

    def newest_slots(self, first_seq: int, last_seq: int, counts: np.ndarray) -> torch.Tensor:
        """[sum of counts] int64: of first_seq … last_seq - 1 the slots of the newest counts."""
        lasts = np.array(self.seq_lens[first_seq:last_seq], dtype=np.int64)
        table = self.block_table[first_seq:last_seq]
        return list_slots(table, self.block_size, lasts - counts, lasts)

    def head_rows(self, slots: np.ndarray) -> torch.Tensor:
        """From slots [num_seqs, n]: keys, then values; of each the sequences, their heads, slots.

        So that each head's keys come to lie side by side, which products of matrices need.
        """
        heads = np.arange(self.heads.num_kv_heads)[:, None]
        keys_values = 2 * slots[:, None] + np.arange(2)[:, None, None, None]
        return torch.from_numpy(keys_values * self.heads.num_kv_heads + heads).flatten()
