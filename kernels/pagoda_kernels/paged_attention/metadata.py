"""What one step's attention needs to know about its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decode rows of similar length, whose keys are gathered and attended to in one call."""

    first: int
    last: int
    """Sequences first … last - 1 of the step."""
    head_rows: torch.Tensor
    """[2 * rows * num_kv_heads * width] int64: rows of the cache seen as a table of head_dim
    columns; all keys, then all values. Past the end of a sequence its last slot is repeated."""
    mask: torch.Tensor
    """[rows * num_kv_heads, 1, width] in the dtype of the queries: 0 or -inf, added to scores."""


@dataclass(frozen=True, slots=True)
class PrefillBlock:
    """Some query tokens of a prefill chunk, and the keys that they may see."""

    first: int
    last: int
    """Query tokens first … last - 1 of the step."""
    first_key: int
    last_key: int
    """Keys first_key … last_key - 1 of those that were gathered for the chunk."""
    mask: torch.Tensor
    """[num_queries, n] in the dtype of the queries: 0 or -inf, added to the last n scores."""


@dataclass(frozen=True, slots=True)
class PrefillGather:
    """The keys that one prefill chunk may see."""

    head_rows: torch.Tensor
    """[2 * num_kv_heads * num_keys] int64: as in DecodeBucket; of each head the oldest first."""
    blocks: tuple[PrefillBlock, ...]


@dataclass(frozen=True, slots=True)
class SingleQueries:
    """Query tokens of one sequence, each attended to as if it were alone."""

    first: int
    last: int
    """Query tokens first … last - 1 of the step."""
    slots: torch.Tensor
    """[width] int64: cache slots of the keys; past the end a slot is repeated."""
    mask: torch.Tensor
    """[num_queries, 1, 1, width] in the dtype of the queries: 0 or -inf, added to the scores."""


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """How the CPU path reads the cache in one step, for one sliding window."""

    buckets: tuple[DecodeBucket, ...]
    prefills: tuple[PrefillGather, ...]
    singles: tuple[SingleQueries, ...] = ()


class GatherBuffer:
    """Memory for gathered keys and values that all layers and steps use in turn.

    Fresh memory for each layer would have to be mapped by the kernel each time, and would push the
    weights out of the processor's cache.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def rows(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """[num_rows, ...] of the trailing shape, dtype and device of `like`; contents are stale."""
        wanted = num_rows * like[0].numel()
        memory = self._memory
        if memory.numel() < wanted or memory.dtype != like.dtype or memory.device != like.device:
            memory = self._memory = like.new_empty(wanted)
        return memory[:wanted].view(num_rows, *like.shape[1:])


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The sequences of one step. Those with one query token come first, shortest first.

    query_start_loc: [num_seqs + 1] int32, first query token of each sequence, then the total.
    seq_lens: [num_seqs] int32, tokens in the cache including this step's.
    block_table: [num_seqs, max_blocks] int32; entries past the last used block are not read.
    plans: for the CPU path, by sliding window (0: none); empty on other devices.
    buffer: for the CPU path.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    plans: dict[int, GatherPlan] = field(default_factory=dict)
    buffer: GatherBuffer = field(default_factory=GatherBuffer)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_table: np.ndarray,
        *,
        block_size: int,
        num_kv_heads: int,
        windows: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        buffer: GatherBuffer | None = None,
        is_deterministic: bool = False,
    ) -> AttentionMetadata:
        """Lay out one step.

        Args:
            query_lens, seq_lens: per sequence; sequences with one query token must come first,
                in ascending order of seq_lens.
            block_table: [num_seqs, max_blocks] int32 on the host.
            num_kv_heads: of the cache.
            windows: the sliding windows of the model's layers, 0 for full attention.
            dtype: of the queries.
            buffer: pass the same one at each step, so that its memory is reused.
            is_deterministic: let the bits of a token's result depend on its own sequence alone,
                not on the step's other tokens nor on how prompts are cut; slower.
        """
        num_decodes = 0
        while num_decodes < len(query_lens) and query_lens[num_decodes] == 1:
            num_decodes += 1
        if 1 in query_lens[num_decodes:]:
            raise ValueError("Sequences with one query token must come before the others.")
        starts = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        plans = {}
        if device.type == "cpu":
            layout = _Layout(
                query_lens, seq_lens, starts, block_table, block_size, num_kv_heads, num_decodes
            )
            plan = _plan_singles if is_deterministic else _plan
            plans = {window: plan(layout, window, dtype) for window in windows}
        return cls(
            query_start_loc=torch.from_numpy(starts).to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=torch.from_numpy(block_table).to(device),
            num_decodes=num_decodes,
            plans=plans,
            buffer=GatherBuffer() if buffer is None else buffer,
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    starts: np.ndarray
    block_table: np.ndarray
    block_size: int
    num_kv_heads: int
    num_decodes: int

    def slots(self, seq: slice | int, positions: np.ndarray) -> np.ndarray:
        """Cache slots of positions ([..., n]) of one sequence, or row by row of a range of them."""
        blocks, offsets = np.divmod(positions, self.block_size)
        if isinstance(seq, slice):
            table = np.take_along_axis(self.block_table[seq], blocks, axis=1)
        else:
            table = self.block_table[seq, blocks]
        return table.astype(np.int64) * self.block_size + offsets

    def head_rows(self, slots: np.ndarray) -> torch.Tensor:
        """From slots [num_seqs, n]: keys, then values; of each the sequences, their heads, slots.

        So that each head's keys come to lie side by side, which products of matrices need.
        """
        heads = np.arange(self.num_kv_heads)[:, None]
        keys_values = 2 * slots[:, None] + np.arange(2)[:, None, None, None]
        return torch.from_numpy(keys_values * self.num_kv_heads + heads).flatten()


def _plan(layout: _Layout, window: int, dtype: torch.dtype) -> GatherPlan:
    return GatherPlan(
        buckets=tuple(_decode_buckets(layout, window, dtype)),
        prefills=tuple(
            _prefill_gather(layout, window, seq, dtype)
            for seq in range(layout.num_decodes, len(layout.query_lens))
        ),
    )


_SMALLEST_BUCKET = 256
# Keys are gathered in multiples of this: oneDNN takes 0.3 ms to make a product of a new shape.
_WIDTH_UNIT = 32
# Tokens gathered at once, which bounds the memory of a gather at many long sequences.
_LARGEST_GATHER = 1 << 15


def _decode_buckets(layout: _Layout, window: int, dtype: torch.dtype) -> list[DecodeBucket]:
    """Cut the decode rows where the number of visible keys passes a power of two.

    So at most half of what is gathered is padding, and the number of calls does not depend on
    the number of rows.
    """
    lens = np.asarray(layout.seq_lens[: layout.num_decodes], dtype=np.int64)
    visible = np.minimum(lens, window) if window else lens
    buckets = []
    first = 0
    while first < len(lens):
        limit = max(_SMALLEST_BUCKET, 1 << int(visible[first] - 1).bit_length())
        last = int(np.searchsorted(visible, limit, side="right"))
        last = min(last, first + max(1, _LARGEST_GATHER // limit))
        seqs = slice(first, last)
        width = _padded_width(int(visible[last - 1]))
        offsets = np.arange(width)
        # Past the end the last position is repeated: a slot that was written, so whatever unused
        # slots contain (even NaN, which no mask can hide) is never read.
        within = np.minimum(offsets, visible[seqs, None] - 1)
        slots = layout.slots(seqs, lens[seqs, None] - visible[seqs, None] + within)
        padding = np.repeat(offsets >= visible[seqs, None], layout.num_kv_heads, axis=0)
        mask = _additive(padding[:, None], dtype)
        buckets.append(DecodeBucket(first, last, layout.head_rows(slots), mask))
        first = last
    return buckets


def _padded_width(num_keys: int) -> int:
    return -(-num_keys // _WIDTH_UNIT) * _WIDTH_UNIT


# Queries whose scores are computed at once, fewer if there are many keys: more would compute more
# scores that the causal mask hides, fewer would leave the products too small.
_QUERY_BLOCK = 128
_LARGEST_SCORES = 1 << 21


def _prefill_gather(layout: _Layout, window: int, seq: int, dtype: torch.dtype) -> PrefillGather:
    num_queries, seq_len = layout.query_lens[seq], layout.seq_lens[seq]
    start = seq_len - num_queries
    oldest = max(0, start - window + 1) if window else 0
    newest = oldest
    first = int(layout.starts[seq])
    size = max(1, min(_QUERY_BLOCK, _LARGEST_SCORES // seq_len))
    blocks = []
    for query in range(start, seq_len, size):
        end = min(query + size, seq_len)
        first_key = max(0, query - window + 1) if window else 0
        # Without a window only the keys of the block's own tokens can be hidden from some of them.
        masked = first_key if window and first_key <= end - 1 - window else query
        last_key = first_key + _padded_width(end - first_key)
        newest = max(newest, last_key)
        keys, queries = np.arange(masked, last_key), np.arange(query, end)[:, None]
        hidden = keys > queries
        if window:
            hidden |= keys <= queries - window
        blocks.append(
            PrefillBlock(
                first + query - start,
                first + end - start,
                first_key - oldest,
                last_key - oldest,
                _additive(hidden, dtype),
            )
        )
    slots = layout.slots(seq, np.minimum(np.arange(oldest, newest), seq_len - 1))
    return PrefillGather(layout.head_rows(slots[None]), tuple(blocks))


def _additive(hidden: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """0, or -inf where hidden."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)


# Keys are gathered in widths of this many, from a position that is a multiple of it. It is the
# number of keys that torch's attention on a CPU takes at a time, so a key always has the same
# place in the same sum, and what is masked adds zeros to it.
_FIXED_WIDTH = 512


def _plan_singles(layout: _Layout, window: int, dtype: torch.dtype) -> GatherPlan:
    singles = [_single_queries(layout, window, seq, dtype) for seq in range(len(layout.seq_lens))]
    return GatherPlan((), (), tuple(singles))


def _single_queries(layout: _Layout, window: int, seq: int, dtype: torch.dtype) -> SingleQueries:
    num_queries, seq_len = layout.query_lens[seq], layout.seq_lens[seq]
    start = seq_len - num_queries
    oldest = max(0, start - window + 1) if window else 0
    base = oldest // _FIXED_WIDTH * _FIXED_WIDTH
    width = -(-(seq_len - base) // _FIXED_WIDTH) * _FIXED_WIDTH
    keys = np.arange(base, base + width)
    queries = np.arange(start, seq_len)[:, None]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    mask = _additive(hidden, dtype)
    first = int(layout.starts[seq])
    # Blocks before the window may have been given back: their slots are not read.
    slots = layout.slots(seq, np.clip(keys, oldest, seq_len - 1))
    return SingleQueries(first, first + num_queries, torch.from_numpy(slots), mask[:, None, None])
