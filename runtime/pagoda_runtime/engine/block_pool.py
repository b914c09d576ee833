"""The blocks of the KV cache: who holds them, which are free, and what the free ones still hold.

Pure Python over ints. Block ids run from 1 to num_blocks; block 0 is never handed out, because
the runner lets padding write there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

# Parent of the first block of every chain.
ROOT_HASH = bytes(32)


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name the content of a full block: its tokens and, through parent, all tokens before them.

    A collision would show one user's text to another, hence a cryptographic hash.
    """
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


class BlockPool:
    """Reference counts, a free list and the prefix cache.

    A block whose count falls to 0 goes to the free list but keeps its content and its hash until
    it is handed out again, so that a later prompt may take it back from the middle of the list.
    The list is two int arrays, a ring through block 0: next[0] is the block that is handed out
    next, prev[0] the one that lives longest.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        assert num_blocks >= 1
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_free = num_blocks
        self._references = [0] * (num_blocks + 1)
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self._hash_of_block: list[bytes | None] = [None] * (num_blocks + 1)
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix; they are not held until `hold`."""
        blocks = []
        for block_hash in block_hashes:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        return sum(1 for block in blocks if self._references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; the free ones leave the free list."""
        for block in blocks:
            if self._references[block] == 0:
                self._unlink(block)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, least recently used first; what they held is forgotten."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = []
        for _ in range(count):
            block = self._next[0]
            self._unlink(block)
            block_hash = self._hash_of_block[block]
            if block_hash is not None:
                del self._block_of_hash[block_hash]
                self._hash_of_block[block] = None
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, block_table: Sequence[int]) -> None:
        """Drop a reference to each block of a table.

        Last block first: the tail of a prompt is evicted before the head, which more prompts share.
        """
        for block in reversed(block_table):
            assert self._references[block] > 0, f"block {block} is not held"
            self._references[block] -= 1
            if self._references[block] == 0:
                # A block that no prompt can find is of no use in the cache: reuse it first.
                before = self._prev[0] if self._hash_of_block[block] is not None else 0
                self._link_after(before, block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Let later prompts find this full, computed block by its content.

        If another block holds the same content already, that one stays the one to be found.
        """
        assert self._references[block] > 0
        if self._hash_of_block[block] is None and block_hash not in self._block_of_hash:
            self._hash_of_block[block] = block_hash
            self._block_of_hash[block_hash] = block

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that references equal table entries, and that free and used blocks are all."""
        references = [0] * (self.num_blocks + 1)
        for block_table in block_tables:
            assert len(set(block_table)) == len(block_table), f"{block_table} repeats a block"
            for block in block_table:
                references[block] += 1
        assert references[0] == 0, "block 0 is in a table"
        assert references == self._references, "references differ from the tables' entries"
        free, block, before = set(), self._next[0], 0
        while block != 0:
            assert self._prev[block] == before, f"free list is broken at block {block}"
            assert block not in free, "free list is a ring without its end"
            free.add(block)
            before, block = block, self._next[block]
        assert self._prev[0] == before
        assert len(free) == self.num_free
        assert free == {b for b in range(1, self.num_blocks + 1) if references[b] == 0}
        hashed = {b: h for b, h in enumerate(self._hash_of_block) if h is not None}
        assert {h: b for b, h in hashed.items()} == self._block_of_hash

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block] = before
        self._next[block] = after
        self.num_free += 1
