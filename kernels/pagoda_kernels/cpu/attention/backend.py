"""Attention over a paged KV cache on a CPU.

Decode rows go along the cache (`decode`), prompt chunks have a kernel where the processor
multiplies bf16 (`chunks`), and else are products of gathered keys (`gather`). Which of a step's
sequences go which way, and what is read for them, is planned once for all layers that have the
same window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.cpu.attention.chunk_plan import ChunkPlan, can_pack_keys, plan_chunks
from pagoda_kernels.cpu.attention.chunks import attend_chunks
from pagoda_kernels.cpu.attention.decode import DECODE, DecodePlan, plan_decode
from pagoda_kernels.cpu.attention.gather import Batch, attend_batch, plan_batches
from pagoda_kernels.cpu.attention.sequences import Sequences
from pagoda_kernels.cpu.formats import DTYPES
from pagoda_kernels.paged_attention.backend import (
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HeadNorm,
    Rotary,
)
from pagoda_kernels.rotate_and_store import rotate_and_store


class CpuAttention(AttentionBackend):
    """In bf16, fp16 and fp32, with keys and values of the same dtype or of 8 bits."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if spec.dtype not in DTYPES:
            raise ValueError(f"dtype is {spec.dtype}; it must be one of {list(DTYPES)}.")
        if not spec.is_plain:
            raise ValueError("Soft caps, ALiBi and sinks are for GPUs.")
        self.scratch = _Scratch()

    def plan(
        self, query_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> AttentionPlan:
        sequences = Sequences(
            query_lens,
            seq_lens,
            block_table,
            block_size=self.spec.block_size,
            num_blocks=self.kv_caches[0].num_blocks,
        )
        return CpuPlan(self, sequences)


class _Scratch:
    """Memory that all layers and steps use in turn.

    Fresh memory for each layer would have to be mapped by the kernel each time, and would push the
    weights out of the processor's cache.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def numbers(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count]; contents are stale."""
        num_bytes = count * dtype.itemsize
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype)


class _WindowPlan(NamedTuple):
    """What layers with one sliding window do."""

    decode: DecodePlan | None
    chunks: ChunkPlan | None
    batches: tuple[Batch, ...]


class CpuPlan(AttentionPlan):
    """A step as `decode`, `chunks` and `gather` take it."""

    def __init__(self, backend: CpuAttention, sequences: Sequences) -> None:
        spec = backend.spec
        super().__init__(spec, int(sequences.query_lens.sum()))
        self._kv_caches, self._scratch = backend.kv_caches, backend.scratch
        all_seqs = np.arange(len(sequences.query_lens))
        self._slot_mapping = sequences.newest_slots(all_seqs, sequences.query_lens)
        # A window that no sequence has outgrown is none, which saves a plan.
        longest = int(sequences.seq_lens.max(initial=0))
        limits = [window if window < longest else 0 for window in spec.windows]
        plans = {limit: _plan_window(spec, sequences, limit) for limit in set(limits)}
        self.by_layer = [plans[limit] for limit in limits]

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._require_agreement(qkv)
        spec, plan, kv_cache = self.spec, self.by_layer[layer], self._kv_caches[layer]
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        out = torch.empty(len(qkv), spec.num_heads, spec.head_dim, dtype=spec.dtype)
        if len(qkv) > self.num_tokens:
            heads, rotary = heads[: self.num_tokens], rotary.of_first(self.num_tokens)
            out[self.num_tokens :] = 0
        rotate_and_store(heads, *rotary, kv_cache, self._slot_mapping, *(norm or ()))
        numbers, scales = kv_cache
        if plan.decode is not None:
            DECODE[spec.dtype, spec.kv_dtype](
                heads,
                heads.stride(0),
                numbers,
                scales if scales is not None else 0,
                numbers.shape[0] * numbers.shape[1],
                plan.decode.slots,
                len(plan.decode.slots),
                plan.decode.rows,
                len(plan.decode.rows),
                out,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                spec.scale,
            )
        q = heads[:, : spec.num_heads]
        if plan.chunks is not None:
            partials = self._scratch.numbers(plan.chunks.num_partial_numbers, torch.float32)
            attend_chunks(q, kv_cache, plan.chunks, spec.scale, partials, out)
        for batch in plan.batches:
            attend_batch(q, kv_cache, batch, spec.scale, self._scratch.numbers, out)
        return out.flatten(1)


def _plan_window(spec: AttentionSpec, sequences: Sequences, window: int) -> _WindowPlan:
    is_single = sequences.query_lens == 1
    if spec.is_deterministic:
        # The sums of every other way depend on how many tokens there are.
        is_single[:] = True
    singles, others = np.flatnonzero(is_single), np.flatnonzero(~is_single)
    decode, chunks = None, None
    if len(singles):
        decode = plan_decode(sequences, singles, window)
    if len(others) and can_pack_keys(spec.head_dim, spec.dtype):
        chunks = plan_chunks(sequences, others, window, spec, torch.get_num_threads())
        others = others[:0]
    batches = plan_batches(sequences, others, window, spec.num_kv_heads, spec.dtype)
    return _WindowPlan(decode, chunks, batches)
