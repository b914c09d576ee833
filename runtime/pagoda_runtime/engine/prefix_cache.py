"""What sequences find in the prefix cache, and what they leave there."""

from __future__ import annotations

from pagoda_runtime.engine.block_pool import BlockPool, hash_block, root_hash
from pagoda_runtime.engine.request import Request, Sequence


class PrefixCache:
    """Names the blocks of sequences by their content, and asks the pool for them.

    A full block is shared. A block that a prompt has only the beginning of, or that was never
    filled, is copied.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence's tokens begin with; nobody holds them yet."""
        pool = self._pool
        if not self._is_read_by(sequence.request):
            return []
        # At least one token is computed, because sampling needs its logits.
        num_full_blocks = (sequence.num_tokens - 1) // pool.block_size
        self._extend_hashes(sequence, num_full_blocks)
        return pool.find_prefix(sequence.block_hashes[:num_full_blocks])

    def find_donor(self, sequence: Sequence, num_cached_blocks: int) -> tuple[int, int]:
        """A block to copy the beginning of the first new block from, and how many tokens."""
        pool = self._pool
        if not self._is_read_by(sequence.request):
            return 0, 0
        first = num_cached_blocks * pool.block_size
        wanted = sequence.token_ids[first : min(first + pool.block_size, sequence.num_tokens - 1)]
        return pool.find_donor(self._past_of_block(sequence, num_cached_blocks), wanted)

    def register_blocks(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Let others find the blocks that were filled up to here, by a step that has run."""
        pool = self._pool
        num_full = num_computed_tokens // pool.block_size
        if not pool.enable_prefix_caching or num_full <= sequence.num_registered_blocks:
            return
        self._extend_hashes(sequence, num_full)
        for i in range(sequence.num_registered_blocks, num_full):
            if sequence.block_table[i] != 0:
                pool.register(
                    sequence.block_table[i],
                    sequence.block_hashes[i],
                    self._past_of_block(sequence, i),
                    sequence.token_ids[i * pool.block_size : (i + 1) * pool.block_size],
                )
        sequence.num_registered_blocks = num_full

    def register_tail(self, sequence: Sequence) -> None:
        """Let others copy from the partly filled last block; what steps in flight add is not in."""
        size = self._pool.block_size
        num_known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        num_full, num_rest = divmod(num_known, size)
        if self._pool.enable_prefix_caching and num_rest and sequence.block_table[num_full]:
            self._extend_hashes(sequence, num_full)
            self._pool.register_tail(
                sequence.block_table[num_full],
                self._past_of_block(sequence, num_full),
                sequence.token_ids[num_full * size : num_known],
            )

    def _is_read_by(self, request: Request) -> bool:
        # Who asks for the logprobs of the prompt needs all its logits.
        return self._pool.enable_prefix_caching and request.sampling_params.prompt_logprobs is None

    def _past_of_block(self, sequence: Sequence, number: int) -> bytes:
        """The hash of all that comes before a block of the sequence; it must be known."""
        if number == 0:
            return root_hash(sequence.request.cache_salt)
        return sequence.block_hashes[number - 1]

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size, hashes = self._pool.block_size, sequence.block_hashes
        for i in range(len(hashes), num_blocks):
            block_tokens = sequence.token_ids[i * size : (i + 1) * size]
            hashes.append(hash_block(self._past_of_block(sequence, i), block_tokens))
