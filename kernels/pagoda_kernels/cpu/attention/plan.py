"""How the CPU path reads the cache in one step: what to gather, and who may see what of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagoda_kernels.cpu.attention.chunk_plan import Chunks, can_pack_keys, plan_chunks
from pagoda_kernels.cpu.attention.layout import Layout


@dataclass(frozen=True, slots=True)
class DecodeWalk:
    """All decode rows of a step, in bf16."""

    slots: torch.Tensor
    """[num_keys] int64: cache slots that the first row sees, then the second, …"""
    ends: torch.Tensor
    """[num_decodes] int64: where the slots of each end."""


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decode rows of similar length, not in bf16: their keys are gathered and used at once."""

    first: int
    last: int
    """Sequences first … last - 1 of the step."""
    head_rows: torch.Tensor
    """[2 * rows * num_kv_heads * width] int64: rows of the cache seen as a table of head_dim
    columns; all keys, then all values. Past the end of a sequence its last slot is repeated."""
    mask: torch.Tensor
    """[rows * num_kv_heads, 1, 1, width] in the dtype of the queries: 0 or -inf, added to the
    scores."""


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Short prefill chunks of similar length whose keys are gathered and used at once."""

    tokens: torch.Tensor
    """[chunks * num_queries] int64: query tokens of the step; past the end of a chunk its last
    one is repeated."""
    head_rows: torch.Tensor
    """[2 * chunks * num_kv_heads * width] int64: as in DecodeBucket."""
    mask: torch.Tensor
    """[chunks * num_kv_heads, 1, num_queries, width] in the dtype of the queries: 0 or -inf."""


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
    """The keys that one prefill chunk may see, gathered."""

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

    walk: DecodeWalk | None = None
    chunks: Chunks | None = None
    buckets: tuple[DecodeBucket, ...] = ()
    batches: tuple[PrefillBatch, ...] = ()
    prefills: tuple[PrefillGather, ...] = ()
    singles: tuple[SingleQueries, ...] = ()


def make_plan(layout: Layout, window: int, dtype: torch.dtype) -> GatherPlan:
    """How to attend to decode rows and to prefill chunks.

    In bf16 each has its own kernel, if the processor has what it needs. Else keys are gathered: of
    decode rows and short chunks many at a time, of long chunks one by one.
    """
    lens = np.asarray(layout.seq_lens[: layout.num_decodes], dtype=np.int64)
    visible = np.minimum(lens, window) if window else lens
    walks = layout.num_decodes > 0 and dtype is torch.bfloat16
    prefills = range(layout.num_decodes, len(layout.query_lens))
    chunks = None
    if prefills and can_pack_keys(layout.heads.head_dim, dtype):
        chunks, prefills = plan_chunks(layout, window), range(0)
    long = [seq for seq in prefills if layout.seq_lens[seq] > _LONGEST_BATCHED]
    short = sorted(set(prefills).difference(long), key=layout.query_lens.__getitem__)
    return GatherPlan(
        walk=_decode_walk(layout, visible) if walks else None,
        chunks=chunks,
        buckets=() if walks else tuple(_decode_buckets(layout, lens, visible, dtype)),
        batches=tuple(
            _prefill_batch(layout, window, seqs, dtype)
            for seqs in _of_similar_length(short, layout.query_lens)
        ),
        prefills=tuple(_prefill_gather(layout, window, seq, dtype) for seq in long),
    )


def _decode_walk(layout: Layout, visible: np.ndarray) -> DecodeWalk:
    slots = layout.newest_slots(0, layout.num_decodes, visible)
    return DecodeWalk(slots, torch.from_numpy(np.cumsum(visible)))


_SMALLEST_BUCKET = 256
# Keys are gathered in multiples of this: oneDNN takes 0.3 ms to make a product of a new shape.
_WIDTH_UNIT = 32
# Tokens gathered at once, which bounds the memory of a gather at many long sequences.
_LARGEST_GATHER = 1 << 15


def _decode_buckets(
    layout: Layout, lens: np.ndarray, visible: np.ndarray, dtype: torch.dtype
) -> list[DecodeBucket]:
    """Cut the decode rows where the number of visible keys passes a power of two.

    So at most half of what is gathered is padding, and the number of calls does not depend on
    the number of rows.
    """
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
        padding = np.repeat(offsets >= visible[seqs, None], layout.heads.num_kv_heads, axis=0)
        mask = _additive(padding[:, None, None], dtype)
        buckets.append(DecodeBucket(first, last, layout.head_rows(slots), mask))
        first = last
    return buckets


def _padded_width(num_keys: int) -> int:
    return -(-num_keys // _WIDTH_UNIT) * _WIDTH_UNIT


# Sequences up to this length are attended to many at a time while their prompts are computed.
_LONGEST_BATCHED = 256
_MOST_BATCHED = 32


def _of_similar_length(seqs: Sequence[int], query_lens: Sequence[int]) -> Iterator[list[int]]:
    """Cut sequences in ascending order of length so that at most half of a batch is padding."""
    batch: list[int] = []
    for seq in seqs:
        if batch and (query_lens[seq] > 2 * query_lens[batch[0]] or len(batch) == _MOST_BATCHED):
            yield batch
            batch = []
        batch.append(seq)
    if batch:
        yield batch


def _prefill_batch(
    layout: Layout, window: int, seqs: Sequence[int], dtype: torch.dtype
) -> PrefillBatch:
    query_lens, seq_lens = (
        np.array([lens[seq] for seq in seqs], dtype=np.int64)[:, None]
        for lens in (layout.query_lens, layout.seq_lens)
    )
    # Past the end of a chunk its last query is repeated, and past the end of a sequence its last
    # slot: unused slots are never read, whatever they contain.
    offsets = np.minimum(np.arange(query_lens.max()), query_lens - 1)
    queries = (seq_lens - query_lens + offsets)[..., None]
    keys = np.arange(_padded_width(int(seq_lens.max())))
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
        # Blocks before the window may have been given back: their slots are not read.
        oldest = np.maximum(seq_lens - query_lens + 1 - window, 0)
    else:
        oldest = np.zeros_like(seq_lens)
    slots = layout.slots(np.array(seqs), np.clip(keys, oldest, seq_lens - 1))
    mask = _additive(np.repeat(hidden, layout.heads.num_kv_heads, axis=0)[:, None], dtype)
    tokens = layout.starts[seqs][:, None] + offsets
    return PrefillBatch(torch.from_numpy(tokens).flatten(), layout.head_rows(slots), mask)


# Queries whose scores are computed at once, fewer if there are many keys: more would compute more
# scores that the causal mask hides, fewer would leave the products too small.
_QUERY_BLOCK = 128
_LARGEST_SCORES = 1 << 21


def _prefill_gather(layout: Layout, window: int, seq: int, dtype: torch.dtype) -> PrefillGather:
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


def plan_singles(layout: Layout, window: int, dtype: torch.dtype) -> GatherPlan:
    """Every query token by itself."""
    singles = [_single_queries(layout, window, seq, dtype) for seq in range(len(layout.seq_lens))]
    return GatherPlan(singles=tuple(singles))


def _single_queries(layout: Layout, window: int, seq: int, dtype: torch.dtype) -> SingleQueries:
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
