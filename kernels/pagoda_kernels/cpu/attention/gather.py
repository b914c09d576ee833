"""Attention of prompt chunks by torch's products of gathered keys and values.

The gather lays each head's keys side by side, then its values, because products of matrices are
several times slower on keys that lie between values. Short chunks are attended to many at a time.

Two batched products and a softmax take less than half of the time of torch's fused attention on a
CPU, whose products are of one sequence and one head at a time. They round the scores to the dtype
of the products before the softmax, which does not show beside the rounding of keys and queries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.sequences import Sequences
from pagoda_kernels.cpu.compiled import row_of
from pagoda_kernels.cpu.formats import UNITS, VIEWS, floats, int64s, scale_row
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader
from pagoda_kernels.kv_cache import LARGEST, KVCache

# Sequences up to this length are attended to many at a time.
_LONGEST_BATCHED = 256
_MOST_BATCHED = 32
# Queries whose scores are computed at once, fewer if there are many keys: more would compute more
# scores that the causal mask hides, fewer would leave the products too small.
_QUERY_BLOCK = 128
_LARGEST_SCORES = 1 << 21
# Keys are gathered in multiples of this: oneDNN takes 0.3 ms to make a product of a new shape.
_WIDTH_UNIT = 32


# Of a head, that a thread gathers at a time.
_ROWS_PER_PART = 64


class _GatherArguments(NamedTuple):
    """Addresses and numbers: see `_gather`."""

    numbers: int
    scales: int
    num_cache_rows: int
    rows: int
    num_rows: int
    head_dim: int
    gathered: int


_arguments = make_reader(_GatherArguments)


class QueryBlock(NamedTuple):
    """Some query tokens of each chunk of a batch, and the keys that they may see."""

    tokens: torch.Tensor
    """[num_chunks * num_queries] int64: query tokens of the step; past the end of a chunk its last
    one is repeated."""
    first_key: int
    last_key: int
    """Keys first_key … last_key - 1 of those that were gathered of each head."""
    mask: torch.Tensor
    """[num_chunks, 1, 1, num_queries, n] in the dtype of the products: 0 or -inf, added to the
    scores of the last n keys."""


class Batch(NamedTuple):
    """Chunks whose keys are gathered at once."""

    num_chunks: int
    head_rows: torch.Tensor
    """[2 * num_chunks * num_kv_heads * width] int64: rows of the cache seen as a table of head_dim
    columns; all keys, then all values; of each the chunks, their heads, slots. Past the end of a
    sequence its last slot is repeated: slots that nobody wrote are never read."""
    blocks: tuple[QueryBlock, ...]


def plan_batches(
    sequences: Sequences, seqs: np.ndarray, window: int, num_kv_heads: int, dtype: torch.dtype
) -> tuple[Batch, ...]:
    """For the query tokens of some sequences; dtype: of the queries."""
    return tuple(
        _make_batch(sequences, batch, window, num_kv_heads, _product_dtype(dtype))
        for batch in _of_similar_length(sequences, seqs)
    )


def _of_similar_length(sequences: Sequences, seqs: np.ndarray) -> Iterator[np.ndarray]:
    """Cut sequences so that at most half of a batch is padding; a long one is a batch."""
    is_long = sequences.seq_lens[seqs] > _LONGEST_BATCHED
    yield from seqs[is_long, None]
    short = seqs[~is_long]
    short = short[np.argsort(sequences.query_lens[short], kind="stable")]
    lens = sequences.query_lens[short]
    first = 0
    while first < len(short):
        last = int(np.searchsorted(lens, 2 * lens[first], side="right"))
        last = min(last, first + _MOST_BATCHED)
        yield short[first:last]
        first = last


def _make_batch(
    sequences: Sequences, seqs: np.ndarray, window: int, num_kv_heads: int, dtype: torch.dtype
) -> Batch:
    counts = sequences.num_visible(seqs, window)
    most_queries = int(sequences.query_lens[seqs].max())
    # Positions here are relative to the oldest key that a chunk sees.
    starts = (counts - sequences.query_lens[seqs])[:, None]
    size = max(1, min(_QUERY_BLOCK, _LARGEST_SCORES // (len(seqs) * int(counts.max()))))
    blocks, width = [], 0
    for first in range(0, most_queries, size):
        # Past the end of a chunk its last query is repeated.
        within = np.arange(first, min(first + size, most_queries))
        offsets = np.minimum(within, sequences.query_lens[seqs, None] - 1)
        first_key, last_key, mask = _visible(starts + offsets, window, dtype)
        tokens = torch.from_numpy(sequences.starts[seqs, None] + offsets).flatten()
        blocks.append(QueryBlock(tokens, first_key, last_key, mask))
        width = max(width, last_key)
    slots = sequences.newest_slots(seqs, counts).numpy()
    keys = np.minimum(np.arange(width), counts[:, None] - 1)
    slots = slots[keys + (np.cumsum(counts) - counts)[:, None]]
    heads = np.arange(num_kv_heads)[:, None]
    keys_values = 2 * slots[:, None] + np.arange(2)[:, None, None, None]
    head_rows = torch.from_numpy(keys_values * num_kv_heads + heads).flatten()
    return Batch(len(seqs), head_rows, tuple(blocks))


def _visible(
    positions: np.ndarray, window: int, dtype: torch.dtype
) -> tuple[int, int, torch.Tensor]:
    """The first and last key that queries at [num_chunks, num_queries] see, and their mask."""
    first, last = int(positions.min()), int(positions.max())
    first_key = max(0, first - window + 1) if window else 0
    last_key = first_key + -(-(last + 1 - first_key) // _WIDTH_UNIT) * _WIDTH_UNIT
    # Without a window only the keys of the block's own tokens can be hidden from some of them.
    first_masked = first_key if window and first_key <= last - window else first
    keys, queries = np.arange(first_masked, last_key), positions[..., None]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    mask = torch.zeros(hidden.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(hidden), -torch.inf)
    return first_key, last_key, mask[:, None, None]


def attend_batch(
    q: torch.Tensor,
    kv_cache: KVCache,
    batch: Batch,
    scale: float,
    make_scratch: Callable[[int, torch.dtype], torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Attend to the query tokens of a batch.

    Args:
        q, out: [num_tokens, num_heads, head_dim]; out is written.
        make_scratch: for so many numbers of a dtype memory to use, one after the other.
    """
    num_kv_heads, head_dim = kv_cache.numbers.shape[3:]
    wide = _gather(kv_cache, batch.head_rows, _product_dtype(q.dtype), make_scratch)
    keys, values = wide.view(2, batch.num_chunks * num_kv_heads, -1, head_dim)
    for block in batch.blocks:
        grouped = q.index_select(0, block.tokens).to(wide.dtype)
        # Those that share a key head: all tokens of the first query head, then of the second.
        by_head = grouped.view(
            batch.num_chunks, -1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim
        ).permute(0, 2, 3, 1, 4)
        queries = by_head.reshape(len(keys), -1, head_dim)
        seen = slice(block.first_key, block.last_key)
        # With beta=0 the first argument is not read.
        scores = torch.baddbmm(
            queries[..., :1], queries, keys[:, seen].transpose(1, 2), beta=0, alpha=scale
        )
        by_query = scores.view(*by_head.shape[:4], -1)
        by_query[..., -block.mask.shape[-1] :].add_(block.mask)
        attended = torch.bmm(scores.softmax(-1), values[:, seen]).view(by_head.shape)
        by_token = attended.permute(0, 3, 1, 2, 4).reshape(grouped.shape)
        out.index_copy_(0, block.tokens, by_token.to(out.dtype))


def _gather(
    kv_cache: KVCache,
    rows: torch.Tensor,
    dtype: torch.dtype,
    make_scratch: Callable[[int, torch.dtype], torch.Tensor],
) -> torch.Tensor:
    """[num_rows, head_dim] in a dtype: what is stored at these rows."""
    numbers, scales = kv_cache
    size = len(rows), numbers.shape[4]
    gathered_dtype = numbers.dtype if scales is None else dtype
    gathered = make_scratch(size[0] * size[1], gathered_dtype).view(size)
    if scales is None:
        torch.index_select(numbers.view(-1, size[1]), 0, rows, out=gathered)
        return gathered.to(dtype)
    # In one pass: each number is read once, and rounded once after its scale.
    _GATHER[numbers.dtype, dtype](numbers, scales, scales.numel(), rows, *size, gathered)
    return gathered


def _make_kernel(kv_dtype: torch.dtype, dtype: torch.dtype) -> ThreadedKernel:
    view, wide_view = VIEWS[kv_dtype], VIEWS[dtype]
    unit = np.float32(UNITS.get(kv_dtype, 1.0))

    def gather_rows(task: Task) -> None:
        """A part of the work is some rows."""
        a = _arguments(task)
        numbers = view(a.numbers, (a.num_cache_rows, a.head_dim))
        scales, rows = floats(a.scales, (a.num_cache_rows,)), int64s(a.rows, (a.num_rows,))
        gathered = wide_view(a.gathered, (a.num_rows, a.head_dim))
        first = claim(task) * _ROWS_PER_PART
        while first < a.num_rows:
            for i in range(first, min(first + _ROWS_PER_PART, a.num_rows)):
                scale = scales[rows[i]] * unit
                scale_row(row_of(numbers, rows[i]), scale, row_of(gathered, i))
            first = claim(task) * _ROWS_PER_PART

    return ThreadedKernel(gather_rows, variant=f"{kv_dtype} {dtype}", is_ahead=False)


_GATHER = {
    dtypes: _make_kernel(*dtypes)
    for dtypes in itertools.product(LARGEST, (torch.bfloat16, torch.float32))
}


@functools.cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 if torch multiplies matrices of this dtype one number at a time on this CPU."""
    is_fast = dtype is torch.bfloat16 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return dtype if is_fast else torch.float32
