"""The specification of attention over a paged KV cache in plain torch, a sequence at a time."""

from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.kv_cache import load_reference
from pagoda_kernels.paged_attention.backend import (
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HeadNorm,
    Rotary,
)
from pagoda_kernels.rotate_and_store.reference import rotate_and_store_reference
from pagoda_kernels.transfer import to_device


class ReferenceAttention(AttentionBackend):
    """Scores and sums in fp32; runs on every device, in every dtype."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if spec.is_deterministic:
            raise ValueError("The reference is not deterministic: it multiplies whole chunks.")

    def plan(
        self, query_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> AttentionPlan:
        return ReferencePlan(self, query_lens, seq_lens, block_table)

    def plan_on_device(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> AttentionPlan:
        return ReferenceDevicePlan(self, seq_lens, block_table)


class ReferencePlan(AttentionPlan):
    """Of each sequence the slots of its tokens, oldest first, and how many of them are new."""

    def __init__(
        self,
        backend: ReferenceAttention,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
    ) -> None:
        super().__init__(backend.spec, int(query_lens.sum()))
        self.kv_caches, self.query_lens = backend.kv_caches, query_lens
        block_size, device = self.spec.block_size, self.spec.device
        table = to_device(block_table, device).long()
        self.slots = []
        for blocks, seq_len in zip(table, seq_lens, strict=True):
            positions = torch.arange(seq_len, device=device)
            self.slots.append(blocks[positions // block_size] * block_size + positions % block_size)
        written = [slots[-count:] for slots, count in zip(self.slots, query_lens, strict=True)]
        self.slot_mapping = torch.cat(written)

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._require_agreement(qkv)
        spec, kv_cache = self.spec, self.kv_caches[layer]
        out = qkv.new_zeros(len(qkv), spec.num_heads, spec.head_dim)
        heads = qkv[: self.num_tokens].view(self.num_tokens, -1, spec.head_dim)
        cos, sin = rotary.of_first(self.num_tokens)
        rotate_and_store_reference(
            heads, cos, sin, kv_cache, self.slot_mapping, *(norm or (None, None))
        )
        group, first = spec.num_heads // spec.num_kv_heads, 0
        for slots, count in zip(self.slots, self.query_lens, strict=True):
            tokens = slice(first, first + count)
            kv = load_reference(kv_cache, slots)
            keys, values = kv.repeat_interleave(group, dim=2).unbind(1)
            queries = heads[tokens, : spec.num_heads].float()
            scores = torch.einsum("qhd,khd->hqk", queries, keys)
            positions = torch.arange(len(keys), device=scores.device)
            distances = positions - positions[len(keys) - len(queries) :, None]
            scores = _score(scores, distances, spec)
            hidden = distances > 0
            if window := spec.windows[layer]:
                hidden |= distances <= -window
            weights = _weigh(scores.masked_fill(hidden, -torch.inf), sinks)
            # A key that nobody sees may be in a block that was given back, and hold anything.
            unseen = hidden.all(dim=0)[:, None, None]
            out[tokens] = torch.einsum("hqk,khd->qhd", weights, values.masked_fill(unseen, 0.0))
            first += count
        return out.flatten(1)


class ReferenceDevicePlan(AttentionPlan):
    """Rows of one token, whose tables are fetched when a layer attends."""

    def __init__(
        self, backend: ReferenceAttention, seq_lens: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        super().__init__(backend.spec, len(seq_lens))
        self.backend, self.seq_lens, self.block_table = backend, seq_lens, block_table

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        seq_lens, table = self.seq_lens.cpu().numpy(), self.block_table.cpu().numpy()
        plan = self.backend.plan(np.ones_like(seq_lens), seq_lens, table)
        return plan.attend(layer, qkv, rotary, norm, sinks)


def _score(scores: torch.Tensor, distances: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[num_heads, num_queries, num_keys] of q·k.

    Args:
        distances: [num_queries, num_keys]: positions of keys, from those of queries on.
    """
    scores = scores * spec.scale
    if spec.soft_cap:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if spec.alibi_slopes:
        slopes = torch.tensor(spec.alibi_slopes, device=scores.device)
        scores += slopes[:, None, None] * distances
    return scores


def _weigh(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """softmax over keys and, if there is one, the sink, which no value stands for."""
    if sinks is None:
        return scores.softmax(dim=-1)
    of_sinks = sinks[:, None, None].expand(*scores.shape[:2], 1)
    return torch.cat((scores, of_sinks), dim=-1).softmax(dim=-1)[..., :-1]
