"""How the threads of a CPU share the prefill chunks of a step: see `chunks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.sequences import Sequences
from pagoda_kernels.cpu.panels import BF16, GROUP_SIZE, has_panels
from pagoda_kernels.paged_attention.backend import AttentionSpec

KEY_BLOCK = 256
"""Keys that are packed at a time, and whose scores are kept."""


class Part(NamedTuple):
    """What a thread takes at a time, for one key head: some queries, and some keys they see."""

    first_token: int
    """Of the step."""
    num_tokens: int
    first_slot: int
    """An index into the slots of all chunks."""
    num_keys: int
    position: int
    """Of the first token; that of the first key is 0."""
    partial: int = -1
    """Where its sums go until they are merged; -1: the queries see no other keys."""


class Merge(NamedTuple):
    """Some queries whose keys several parts have."""

    first_token: int
    num_tokens: int
    first_partial: int
    num_partials: int


class ChunkPlan(NamedTuple):
    """All prefill chunks of a step, in bf16, cut into parts that threads take."""

    slots: torch.Tensor
    """[num_keys] int64: cache slots that a chunk's queries see, oldest first; of all chunks."""
    parts: torch.Tensor
    """[num_parts, fields of Part] int64."""
    merges: torch.Tensor
    """[num_merges, fields of Merge] int64."""
    num_partial_numbers: int
    """fp32 numbers that sums take until they are merged."""
    partial_size: int
    """Of one part and key head; in numbers."""
    most_rows: int
    """Query tokens of a block times the query heads that share a key head, at most."""
    window: int


class Arguments(NamedTuple):
    """Addresses and numbers of both kernels: see `chunks.attend_chunks`."""

    q: int
    q_stride: int
    kv_cache: int
    scales: int
    """0 where the dtype of keys and values has none."""
    num_cache_slots: int
    slots: int
    num_slots: int
    partials: int
    partial_size: int
    out: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Of powers of two."""
    window: int
    most_rows: int
    parts: int
    num_parts: int
    merges: int
    num_merges: int


def can_pack_keys(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether prefill chunks are attended to by the processor's dot products of bf16.

    With AMX torch's products are faster. Args: dtype: of the queries.
    """
    if dtype is not torch.bfloat16 or head_dim % GROUP_SIZE or not has_panels(BF16):
        return False
    return not torch.cpu._is_amx_tile_supported()


# Rows of queries that share packed keys: more would not stay in the cache beside their sums.
_ROWS_PER_BLOCK = 128
# Parts for each thread, so that all end at about the same time.
_PARTS_PER_THREAD = 4


def plan_chunks(
    sequences: Sequences, seqs: np.ndarray, window: int, spec: AttentionSpec, num_threads: int
) -> ChunkPlan:
    """For the query tokens of some sequences; window: 0 for none."""
    visible = sequences.num_visible(seqs, window)
    group = spec.num_heads // spec.num_kv_heads
    most_tokens = max(1, _ROWS_PER_BLOCK // group)
    blocks = list(_query_blocks(sequences, seqs, visible, window, most_tokens))
    num_key_blocks = sum(-(-block.num_keys // KEY_BLOCK) for block in blocks)
    num_parts = _PARTS_PER_THREAD * num_threads
    most_keys = KEY_BLOCK * -(-num_key_blocks * spec.num_kv_heads // num_parts)
    parts, merges = _cut_keys(blocks, most_keys)
    most_rows = max(block.num_tokens for block in blocks) * group
    partial_size = most_rows * (spec.head_dim + 2)
    num_partials = sum(merge.num_partials for merge in merges)
    return ChunkPlan(
        slots=sequences.newest_slots(seqs, visible),
        parts=torch.tensor(parts),
        merges=torch.tensor(merges, dtype=torch.int64).view(-1, len(Merge._fields)),
        num_partial_numbers=num_partials * spec.num_kv_heads * partial_size,
        partial_size=partial_size,
        most_rows=most_rows,
        window=window,
    )


def _query_blocks(
    sequences: Sequences, seqs: np.ndarray, visible: np.ndarray, window: int, most_tokens: int
) -> Iterator[Part]:
    """The queries of each chunk in equal blocks, each with all keys that it sees.

    Args: visible: [num_seqs], how many of a sequence's newest keys its chunk sees.
    """
    first_slot = 0
    for num_visible, num_queries, token in zip(
        visible.tolist(),
        sequences.query_lens[seqs].tolist(),
        sequences.starts[seqs].tolist(),
        strict=True,
    ):
        num_blocks = -(-num_queries // most_tokens)
        cuts = [num_queries * i // num_blocks for i in range(num_blocks + 1)]
        # Positions here are relative to the oldest key that the chunk sees.
        start = num_visible - num_queries
        for first, last in pairwise(cuts):
            key = max(0, start + first - window + 1) if window else 0
            yield Part(
                first_token=token + first,
                num_tokens=last - first,
                first_slot=first_slot + key,
                num_keys=start + last - key,
                position=start + first - key,
            )
        first_slot += num_visible


def _cut_keys(blocks: Sequence[Part], most_keys: int) -> tuple[list[Part], list[Merge]]:
    """Parts with at most so many keys, and what has to be merged of them."""
    parts: list[Part] = []
    merges: list[Merge] = []
    num_partials = 0
    for block in blocks:
        if block.num_keys <= most_keys:
            parts.append(block)
            continue
        firsts = range(0, block.num_keys, most_keys)
        for i, first in enumerate(firsts):
            parts.append(
                block._replace(
                    first_slot=block.first_slot + first,
                    num_keys=min(most_keys, block.num_keys - first),
                    position=block.position - first,
                    partial=num_partials + i,
                )
            )
        merge = Merge(block.first_token, block.num_tokens, num_partials, len(firsts))
        merges.append(merge)
        num_partials += merge.num_partials
    # Threads begin with the most work.
    parts.sort(key=lambda part: part.num_tokens * part.num_keys, reverse=True)
    return parts, merges
