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
    slots: torch.Tensor
    """[rows * width] int64: cache slots; past the end of a row a slot of that row is repeated."""
    mask: torch.Tensor
    """[rows, 1, 1, width] in the dtype of the queries: 0 or -inf, added to the scores."""


@dataclass(frozen=True, slots=True)
class PrefillGather:
    """The keys that one prefill chunk may see."""

    first: int
    last: int
    """Query tokens first … last - 1 of the step."""
    slots: torch.Tensor
    """[num_keys] int64: cache slots of the keys, oldest first."""
    mask: torch.Tensor | None
    """[num_queries, num_keys] bool, or None for the plain lower triangle."""


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
            layout = _Layout(query_lens, seq_lens, starts, block_table, block_size, num_decodes)
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
    num_decodes: int

    def slots(self, seq: slice | int, positions: np.ndarray) -> np.ndarray:
        """Cache slots of positions ([..., n]) of one sequence, or row by row of a range of them."""
        blocks, offsets = np.divmod(positions, self.block_size)
        if isinstance(seq, slice):
            table = np.take_along_axis(self.block_table[seq], blocks, axis=1)
        else:
            table = self.block_table[seq, blocks]
        return table.astype(np.int64) * self.block_size + offsets


def _plan(layout: _Layout, window: int, dtype: torch.dtype) -> GatherPlan:
    return GatherPlan(
        buckets=tuple(_decode_buckets(layout, window, dtype)),
        prefills=tuple(
            _prefill_gather(layout, window, seq)
            for seq in range(layout.num_decodes, len(layout.query_lens))
        ),
    )


_SMALLEST_BUCKET = 256
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
        width = int(visible[last - 1])
        offsets = np.arange(width)
        # Past the end the last position is repeated: a slot that was written, so whatever unused
        # slots contain (even NaN, which no mask can hide) is never read.
        within = np.minimum(offsets, visible[seqs, None] - 1)
        slots = layout.slots(seqs, lens[seqs, None] - visible[seqs, None] + within)
        padding = torch.from_numpy(offsets >= visible[seqs, None])[:, None, None]
        mask = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, -torch.inf)
        buckets.append(DecodeBucket(first, last, torch.from_numpy(slots).flatten(), mask))
        first = last
    return buckets


def _prefill_gather(layout: _Layout, window: int, seq: int) -> PrefillGather:
    num_queries, seq_len = layout.query_lens[seq], layout.seq_lens[seq]
    start = seq_len - num_queries
    oldest = max(0, start - window + 1) if window else 0
    keys = np.arange(oldest, seq_len)
    queries = np.arange(start, seq_len)[:, None]
    is_windowed = bool(window) and seq_len > window
    mask = None
    if start or is_windowed:
        visible = keys <= queries
        if is_windowed:
            visible &= keys > queries - window
        mask = torch.from_numpy(visible)
    first = int(layout.starts[seq])
    return PrefillGather(
        first, first + num_queries, torch.from_numpy(layout.slots(seq, keys)), mask
    )


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
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    first = int(layout.starts[seq])
    # Blocks before the window may have been given back: their slots are not read.
    slots = layout.slots(seq, np.clip(keys, oldest, seq_len - 1))
    return SingleQueries(first, first + num_queries, torch.from_numpy(slots), mask[:, None, None])
