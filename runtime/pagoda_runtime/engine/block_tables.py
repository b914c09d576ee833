"""Which blocks each sequence holds: when it is admitted, grows, shares and leaves."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda_runtime.engine.block_pool import BlockPool
from pagoda_runtime.engine.prefix_cache import PrefixCache
from pagoda_runtime.engine.request import Sequence


class BlockTables:
    """Fills the tables of sequences from one pool.

    A table is a new list each time that it changes: the row of a step in flight may show the old
    one. `copies` below are the block copies of the step that is being planned, source by target.

    Args:
        sliding_window: positions that any layer sees back from a token, itself included; 0 if some
            layer sees all. Blocks behind it are given back.
    """

    def __init__(self, pool: BlockPool, *, sliding_window: int = 0) -> None:
        self.pool = pool
        self.prefix_cache = PrefixCache(pool)
        self.sliding_window = sliding_window
        self._num_reserved = 0

    def admit(
        self, sequence: Sequence, num_tokens: int, num_spared: int, copies: dict[int, int]
    ) -> bool:
        """Give the sequence blocks for its next num_tokens and reserve the others, or nothing.

        All are spoken for at once although the prompt may be computed in chunks: half-computed
        prompts that wait for each other's blocks would deadlock. But only what a step fills is
        taken, so that until then free blocks keep what others may find in them.

        Args:
            num_spared: blocks that must stay free beside.
        """
        pool = self.pool
        cached = self.prefix_cache.find_prefix(sequence)
        num_new = pool.num_blocks_for(sequence.num_tokens) - len(cached)
        if self._num_available() - pool.num_free_among(cached) - num_new < num_spared:
            return False
        donor, num_common = self.prefix_cache.find_donor(sequence, len(cached))
        pool.hold(cached)
        sequence.block_table = cached
        self._reserve(sequence, num_new)
        sequence.num_computed_tokens = len(cached) * pool.block_size + num_common
        sequence.num_registered_blocks = len(cached)
        end = min(sequence.num_computed_tokens + num_tokens, sequence.num_tokens)
        self._take(sequence, pool.num_blocks_for(end) - len(cached))
        # The donor itself may be what was handed out; then its content is in place.
        if num_common and donor != sequence.block_table[len(cached)]:
            copies[sequence.block_table[len(cached)]] = donor
        return True

    def extend(self, sequence: Sequence, num_tokens: int, copies: dict[int, int]) -> bool:
        """Make room for num_tokens more, in blocks that nobody else holds; False: too few are free.

        A shared block that would be written is replaced by a copy.
        """
        self._give_back_behind_window(sequence)
        pool, table = self.pool, sequence.block_table
        first_written = sequence.num_computed_tokens // pool.block_size
        is_shared = first_written < len(table) and pool.is_shared(table[first_written])
        missing = pool.num_blocks_for(sequence.num_computed_tokens + num_tokens) - len(table)
        if missing + is_shared > self._num_available() + sequence.num_reserved_blocks:
            return False
        if is_shared:
            shared, own = table[first_written], pool.allocate(1)[0]
            pool.release([shared])
            sequence.block_table = [*table[:first_written], own, *table[first_written + 1 :]]
            copies[own] = shared
        self._take(sequence, missing)
        return True

    def share(self, sequence: Sequence) -> None:
        """Hold the blocks of a sequence that was forked from another."""
        self.pool.hold(block for block in sequence.block_table if block != 0)

    def release(self, sequence: Sequence) -> None:
        """Give all its blocks back; they keep what others may find in them."""
        self.prefix_cache.register_tail(sequence)
        self.pool.release(sequence.block_table)
        self._reserve(sequence, 0)
        sequence.block_table = []
        sequence.num_behind_window = 0
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0

    def num_unfilled_slots(self, sequences: Iterable[Sequence]) -> int:
        """Slots of held blocks without keys and values, those of the step in flight counted in."""
        size = self.pool.block_size
        unfilled = {
            s.block_table[-1]: len(s.block_table) * size - s.num_computed_tokens
            for s in sequences
            if s.block_table
        }
        return sum(unfilled.values())

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every block is accounted for."""
        all_sequences = list(sequences)
        self.pool.check(sequence.block_table for sequence in all_sequences)
        assert self._num_reserved == sum(s.num_reserved_blocks for s in all_sequences)
        assert self._num_available() >= 0

    def _num_available(self) -> int:
        """Free blocks that are reserved for nobody."""
        return self.pool.num_free - self._num_reserved

    def _reserve(self, sequence: Sequence, num_blocks: int) -> None:
        self._num_reserved += num_blocks - sequence.num_reserved_blocks
        sequence.num_reserved_blocks = num_blocks

    def _take(self, sequence: Sequence, num_blocks: int) -> None:
        """Add blocks to the table, those first that were reserved for the sequence."""
        if num_blocks > 0:
            self._reserve(sequence, max(0, sequence.num_reserved_blocks - num_blocks))
            sequence.block_table = [*sequence.block_table, *self.pool.allocate(num_blocks)]

    def _give_back_behind_window(self, sequence: Sequence) -> None:
        if not self.sliding_window:
            return
        first_visible = max(0, sequence.num_computed_tokens - self.sliding_window + 1)
        num_behind = first_visible // self.pool.block_size
        if num_behind > sequence.num_behind_window:
            table = sequence.block_table
            self.pool.release(table[sequence.num_behind_window : num_behind])
            sequence.block_table = [*[0] * num_behind, *table[num_behind:]]
            sequence.num_behind_window = num_behind
