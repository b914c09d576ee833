"""Attention over a paged KV cache on GPUs: kernels in Triton, of single tokens and of chunks."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.launch import num_processors
from pagoda_kernels.paged_attention.backend import (
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HeadNorm,
    Rotary,
)
from pagoda_kernels.paged_attention.decode_kernel import (
    Rows,
    attend_rows,
    find_slots,
    split_keys,
)
from pagoda_kernels.paged_attention.prefill_kernel import (
    Chunks,
    attend_chunks,
    cut_chunks,
    rows_of_tiles,
)
from pagoda_kernels.paged_attention.tiles import Step
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_kernels.transfer import all_to_device


class TritonAttention(AttentionBackend):
    """In bf16, fp16 and fp32, with keys and values of 8 bits too."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if not spec.dtype.is_floating_point or spec.dtype.itemsize > 4:
            raise ValueError(f"dtype is {spec.dtype}; it must be bfloat16, float16 or float32.")
        self.num_processors = num_processors(spec.device)
        self.slopes: torch.Tensor | None = None
        if spec.alibi_slopes:
            self.slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float32, device=spec.device)

    def plan(
        self, query_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> AttentionPlan:
        spec, block_size = self.spec, self.spec.block_size
        table = self._used_blocks(query_lens, seq_lens, block_table)
        starts = np.cumsum(query_lens) - query_lens
        seqs = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(len(seqs)) + (seq_lens - query_lens - starts)[seqs]
        slots = table[seqs, positions // block_size].astype(np.int64) * block_size
        # The sums of a chunk depend on how many tokens it has.
        is_chunk = (query_lens > 1) & (not spec.is_deterministic)
        tokens, chunks = np.flatnonzero(~is_chunk[seqs]), np.flatnonzero(is_chunk)
        num_rows = rows_of_tiles(spec, query_lens[chunks], self.num_processors)
        tokens_of_tile = num_rows // (spec.num_heads // spec.num_kv_heads)
        of_rows = (tokens, seqs[tokens], positions[tokens] + 1)
        slot_mapping, blocks, tiles, *rows = all_to_device(
            (
                slots + positions % block_size,
                table,
                cut_chunks(chunks, query_lens, seq_lens, tokens_of_tile),
                *(numbers.astype(np.int32) for numbers in of_rows),
            ),
            spec.device,
        )
        return TritonPlan(
            self,
            blocks,
            slot_mapping,
            Rows(*rows) if len(tokens) else None,
            int(seq_lens.max(initial=1)),
            Chunks(tiles, num_rows) if len(chunks) else None,
        )

    def plan_on_device(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> AttentionPlan:
        """See the contract. What follows from the numbers is computed as layer 0 attends.

        Raises: ValueError: shapes or dtypes do not agree.
        """
        num_seqs = len(seq_lens)
        if not seq_lens.dtype is block_table.dtype is torch.int32 or len(block_table) != num_seqs:
            raise ValueError(
                f"seq_lens is {list(seq_lens.shape)} in {seq_lens.dtype}, block_table "
                f"{list(block_table.shape)} in {block_table.dtype}; they must be int32, with a row "
                "for each sequence."
            )
        order = torch.arange(num_seqs, dtype=torch.int32, device=seq_lens.device)
        return TritonDevicePlan(
            self,
            block_table,
            torch.empty(num_seqs, dtype=torch.int64, device=seq_lens.device),
            Rows(order, order, seq_lens),
            block_table.shape[1] * self.spec.block_size,
            None,
        )

    def _used_blocks(
        self, query_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> np.ndarray:
        """The table as far as a sequence goes; blocks that nobody sees may be anything.

        Raises: IndexError: a token has no block, or one outside the cache.
        """
        block_size, num_blocks = self.spec.block_size, self.kv_caches[0].num_blocks
        widest = 0 if 0 in self.spec.windows else max(self.spec.windows)
        oldest = np.maximum(0, seq_lens - query_lens + 1 - widest) if widest else 0 * seq_lens
        ends = -(-seq_lens // block_size)
        table = block_table[:, : int(ends.max(initial=1))]
        if len(table) != len(ends) or np.any(ends > table.shape[1]):
            raise IndexError(f"A token has no block: block_table is {list(block_table.shape)}.")
        columns = np.arange(table.shape[1])
        is_seen = (columns >= oldest[:, None] // block_size) & (columns < ends[:, None])
        outside = table[is_seen & ((table < 0) | (table >= num_blocks))]
        if len(outside):
            raise IndexError(f"Block {outside[0]} is outside the cache of {num_blocks} blocks.")
        return table


class TritonPlan(AttentionPlan):
    """A step as the kernels take it.

    block_table: [num_seqs, max_blocks] int32.
    slot_mapping: [num_tokens] int64.
    rows, chunks: the query tokens that one kernel and the other attends to, if any.
    longest: keys that a row has at most.
    """

    def __init__(
        self,
        backend: TritonAttention,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
        rows: Rows | None,
        longest: int,
        chunks: Chunks | None,
    ) -> None:
        spec = backend.spec
        super().__init__(spec, len(slot_mapping))
        self._kv_caches, self._slopes = backend.kv_caches, backend.slopes
        self._block_table, self._slot_mapping = block_table, slot_mapping
        self._rows, self._chunks = rows, chunks
        num_rows = len(rows.tokens) if rows is not None else 0
        self._splits = split_keys(spec, num_rows, longest, backend.num_processors)

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._require_agreement(qkv)
        spec, kv_cache = self.spec, self._kv_caches[layer]
        out = torch.empty(
            (len(qkv), spec.num_heads, spec.head_dim), dtype=spec.dtype, device=qkv.device
        )
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        if len(qkv) > self.num_tokens:
            heads, rotary = heads[: self.num_tokens], rotary.of_first(self.num_tokens)
            out[self.num_tokens :] = 0
        rotate_and_store(heads, *rotary, kv_cache, self._slot_mapping, *(norm or ()))
        step = Step(heads, kv_cache, self._block_table, self._slopes, sinks, out)
        if self._rows is not None:
            attend_rows(step, spec, layer, self._rows, self._splits)
        if self._chunks is not None:
            attend_chunks(step, spec, layer, self._chunks)
        return out.flatten(1)


class TritonDevicePlan(TritonPlan):
    """A step whose sequences are known when layer 0 attends, which must be the first."""

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer == 0 and self._rows is not None:
            find_slots(
                self._slot_mapping, self._block_table, self._rows.num_keys, self.spec.block_size
            )
        return super().attend(layer, qkv, rotary, norm, sinks)
