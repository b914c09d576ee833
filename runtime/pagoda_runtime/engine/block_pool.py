"""The blocks of the KV cache: who holds them, which are free, and what the free ones still hold.

Pure Python over ints. Block ids run from 1 to num_blocks; block 0 is never handed out, because
the runner lets padding write there.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence

# Blocks with the same past that are compared when a prompt parts from all of them.
_MAX_DONORS = 32


def root_hash(cache_salt: str) -> bytes:
    """Parent of the first block of a chain; prefixes with different salts never meet."""
    return hashlib.sha256(cache_salt.encode()).digest()


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

    A block in the prefix cache is found in two ways. A full one has a hash, by which it is shared.
    Any one, also the partly filled end of a sequence, is listed under the hash of its past, so that
    a prompt that parts within the block can copy what they have in common.
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
        self._content: list[tuple[bytes, array[int]] | None] = [None] * (num_blocks + 1)
        """For each block in the prefix cache the hash of its past, and its tokens."""
        self._donors: dict[tuple[bytes, int], dict[int, None]] = {}
        """Blocks by the hash of their past and their first token."""

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

    def find_donor(self, parent: bytes, token_ids: Sequence[int]) -> tuple[int, int]:
        """The block that begins with the most of token_ids after this past, and how many.

        (0, 0) if there is none. Its content is good until the step that is being planned has run.
        """
        best, most = 0, 0
        donors = self._donors.get((parent, token_ids[0]), {}) if token_ids else {}
        for block in itertools.islice(reversed(donors), _MAX_DONORS):
            content = self._content[block]
            assert content is not None
            num_common = _common_length(content[1], token_ids)
            if num_common > most:
                best, most = block, num_common
        return best, most

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

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
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, block_table: Sequence[int]) -> None:
        """Drop a reference to each block of a table.

        Last block first: the tail of a prompt is evicted before the head, which more prompts share.
        """
        for block in reversed(block_table):
            if block == 0:
                continue
            assert self._references[block] > 0, f"block {block} is not held"
            self._references[block] -= 1
            if self._references[block] == 0:
                # A block that no prompt can find is of no use in the cache: reuse it first.
                before = self._prev[0] if self._content[block] is not None else 0
                self._link_after(before, block)

    def register(
        self, block: int, block_hash: bytes, parent: bytes, token_ids: Sequence[int]
    ) -> None:
        """Let later prompts find this full, computed block by its content.

        If another block holds the same content already, that one stays the one to be found.
        """
        assert self._references[block] > 0
        if self._hash_of_block[block] is None and block_hash not in self._block_of_hash:
            self._hash_of_block[block] = block_hash
            self._block_of_hash[block_hash] = block
            self._list_donor(block, parent, token_ids)

    def register_tail(self, block: int, parent: bytes, token_ids: Sequence[int]) -> None:
        """Let later prompts copy from this partly filled block, which nobody writes any more."""
        if self._content[block] is None and not self.is_shared(block):
            self._list_donor(block, parent, token_ids)

    def reset_prefix_cache(self) -> int:
        """Forget what every block holds; how many held something that could be found."""
        known = [block for block, content in enumerate(self._content) if content is not None]
        for block in known:
            self._forget(block)
        return len(known)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that references equal table entries, and that free and used blocks are all."""
        references = [0] * (self.num_blocks + 1)
        for block_table in block_tables:
            held = [block for block in block_table if block != 0]
            assert len(set(held)) == len(held), f"{block_table} repeats a block"
            for block in block_table:
                references[block] += 1
        references[0] = 0  # It stands for blocks behind the window, any number of times.
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
        assert all(self._content[block] is not None for block in hashed)
        listed = [block for donors in self._donors.values() for block in donors]
        known = [block for block, content in enumerate(self._content) if content is not None]
        assert sorted(listed) == known, "the lists of donors differ from the blocks' contents"

    def _list_donor(self, block: int, parent: bytes, token_ids: Sequence[int]) -> None:
        self._content[block] = (parent, array("i", token_ids))
        self._donors.setdefault((parent, token_ids[0]), {})[block] = None

    def _forget(self, block: int) -> None:
        block_hash, content = self._hash_of_block[block], self._content[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hash_of_block[block] = None
        if content is not None:
            parent, token_ids = content
            donors = self._donors[parent, token_ids[0]]
            del donors[block]
            if not donors:
                del self._donors[parent, token_ids[0]]
            self._content[block] = None

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


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of both."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))
