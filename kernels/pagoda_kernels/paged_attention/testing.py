"""Sequences in a paged KV cache, and what attention to them must give, for tests of backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pagoda_kernels.kv_cache import LARGEST, quantize, store_reference
from pagoda_kernels.paged_attention import AttentionBackend, AttentionPlan, AttentionSpec, Rotary

BLOCK_SIZE = 4
# NaN as fp8, and -1 as int8, whose scale is NaN.
_ALL_ONES = 255


class AttentionCase:
    """Random sequences in randomly ordered blocks; every slot that nobody wrote holds NaN.

    All tokens before each sequence's last query_lens are stored.

    Args:
        options: fields of AttentionSpec.
    """

    def __init__(
        self,
        make: Callable[[AttentionSpec], AttentionBackend],
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        *,
        heads: tuple[int, int, int] = (4, 2, 16),
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        num_heads, num_kv_heads, head_dim = heads
        fields: dict[str, Any] = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "windows": (window,),
            "scale": 0.3,
            "dtype": dtype,
            "kv_dtype": dtype,
            "block_size": BLOCK_SIZE,
            "device": torch.device("cpu"),
        }
        self.spec = AttentionSpec(**(fields | options))
        self.query_lens, self.seq_lens = query_lens, seq_lens
        shape = (num_heads + 2 * num_kv_heads, head_dim)
        self.qkv = [torch.randn(length, *shape).to(dtype) for length in seq_lens]
        size = self.spec.block_size
        used = [-(-length // size) for length in seq_lens]
        order = np.random.default_rng(0).permutation(sum(used) + 3) + 1
        # Past a sequence's blocks there is one that nobody writes to.
        self.block_table = np.full((len(seq_lens), max(used)), order[-1], dtype=np.int32)
        for row, count in zip(self.block_table, used, strict=True):
            row[:count], order = order[:count], order[count:]
        self.sinks = torch.randn(num_heads) if self.spec.has_sinks else None
        self.backend = make(self.spec)
        self.backend.allocate(sum(used) + 4)
        for part in itertools.chain(*(cache.tensors for cache in self.backend.kv_caches)):
            part.fill_(torch.nan if part.is_floating_point() else _ALL_ONES)
        for seq, (length, count) in enumerate(zip(seq_lens, query_lens, strict=True)):
            self._store(seq, length - count)

    def _store(self, seq: int, num_tokens: int) -> None:
        """The keys and values of a sequence's first tokens, in every layer."""
        positions, size = torch.arange(num_tokens), self.spec.block_size
        blocks = torch.from_numpy(self.block_table[seq]).long()[positions // size]
        heads = self.qkv[seq][:num_tokens, self.spec.num_heads :]
        kv = heads.reshape(num_tokens, 2, self.spec.num_kv_heads, self.spec.head_dim)
        slots, device = blocks * size + positions % size, self.spec.device
        for kv_cache in self.backend.kv_caches:
            store_reference(kv_cache, slots.to(device), kv.to(device))

    def plan(self, tokens: Sequence[tuple[int, int, int]]) -> AttentionPlan:
        """Args: tokens: sequences, each with the first and the last of its positions, exclusive."""
        seqs, firsts, lasts = np.array(tokens).T
        return self.backend.plan(lasts - firsts, lasts, self.block_table[seqs])

    def step(self, tokens: Sequence[tuple[int, int, int]], num_padding: int = 0) -> torch.Tensor:
        """[num_tokens + num_padding, num_heads, head_dim]: attention of the tokens of `plan`."""
        qkv = torch.cat([self.qkv[seq][first:last] for seq, first, last in tokens]).flatten(1)
        qkv = torch.nn.functional.pad(qkv, (0, 0, 0, num_padding), value=torch.nan)
        device = self.spec.device
        rotary = no_rotation(len(qkv), self.spec.head_dim, device)
        sinks = self.sinks.to(device) if self.sinks is not None else None
        attended = self.plan(tokens).attend(0, qkv.to(device), rotary, sinks=sinks)
        return attended.view(len(qkv), self.spec.num_heads, -1).cpu()

    def attend(self) -> torch.Tensor:
        """Of the last query_lens tokens of each sequence."""
        lens = zip(self.query_lens, self.seq_lens, strict=True)
        return self.step([(seq, end - count, end) for seq, (count, end) in enumerate(lens)])

    def expected(self) -> torch.Tensor:
        """What `attend` must give: one query, one head, one key at a time, in fp32."""
        rows = []
        num_heads, num_kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        for count, qkv in zip(self.query_lens, self.qkv, strict=True):
            q, keys, values = torch.split(
                qkv.float(), [num_heads, num_kv_heads, num_kv_heads], dim=1
            )
            keys, values = as_stored(keys, self.spec), as_stored(values, self.spec)
            rows += [
                brute_force(q[i], keys[: i + 1], values[: i + 1], self.spec, self.sinks)
                for i in range(len(qkv) - count, len(qkv))
            ]
        return torch.stack(rows)


def as_stored(kv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Keys or values, [num_tokens, num_kv_heads, head_dim] fp32, as the cache gives them back."""
    if spec.kv_dtype not in LARGEST:
        return kv
    numbers, scales = quantize(kv, spec.kv_dtype)
    return numbers.float() * scales[..., None]


def brute_force(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query token: q is [num_heads, head_dim], keys and values [num_keys, num_kv_heads, …]."""
    window = spec.windows[0]
    positions = torch.arange(max(0, len(keys) - window) if window else 0, len(keys))
    out = torch.empty(q.shape)
    for head, query in enumerate(q):
        kv_head = head * keys.shape[1] // len(q)
        scores = keys[positions, kv_head] @ query * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        if spec.alibi_slopes:
            scores = scores - spec.alibi_slopes[head] * (len(keys) - 1 - positions)
        if sinks is not None:
            scores = torch.cat((scores, sinks[head, None]))
        weights = torch.softmax(scores, dim=0)[: len(positions)]
        out[head] = weights @ values[positions, kv_head]
    return out


def no_rotation(num_tokens: int, rotary_dim: int, device: torch.device | None = None) -> Rotary:
    shape = (num_tokens, 1, rotary_dim)
    return Rotary(torch.ones(shape, device=device), torch.zeros(shape, device=device))
