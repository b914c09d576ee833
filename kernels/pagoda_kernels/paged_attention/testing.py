"""Sequences in a paged KV cache, and what attention to them must give, for tests of backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionBackend, AttentionPlan, AttentionSpec, Rotary

BLOCK_SIZE = 4


class AttentionCase:
    """Random sequences in randomly ordered blocks; every slot that nobody wrote holds NaN.

    All tokens before each sequence's last query_lens are stored, by an earlier step.

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
        used = [-(-length // BLOCK_SIZE) for length in seq_lens]
        order = np.random.default_rng(0).permutation(sum(used) + 3) + 1
        # Past a sequence's blocks there is one that nobody writes to.
        self.block_table = np.full((len(seq_lens), max(used)), order[-1], dtype=np.int32)
        for row, count in zip(self.block_table, used, strict=True):
            row[:count], order = order[:count], order[count:]
        self.backend = make(self.spec)
        self.backend.allocate(sum(used) + 4)
        for kv_cache in self.backend.kv_caches:
            kv_cache.fill_(torch.nan)
        starts = [length - count for length, count in zip(seq_lens, query_lens, strict=True)]
        stored = [(seq, 0, start) for seq, start in enumerate(starts) if start]
        if stored:
            self.step(stored)

    def plan(self, tokens: Sequence[tuple[int, int, int]]) -> AttentionPlan:
        """Args: tokens: sequences, each with the first and the last of its positions, exclusive."""
        seqs, firsts, lasts = np.array(tokens).T
        return self.backend.plan(lasts - firsts, lasts, self.block_table[seqs])

    def step(self, tokens: Sequence[tuple[int, int, int]], num_padding: int = 0) -> torch.Tensor:
        """[num_tokens + num_padding, num_heads, head_dim]: attention of the tokens of `plan`."""
        qkv = torch.cat([self.qkv[seq][first:last] for seq, first, last in tokens]).flatten(1)
        qkv = torch.nn.functional.pad(qkv, (0, 0, 0, num_padding), value=torch.nan)
        attended = self.plan(tokens).attend(0, qkv, no_rotation(len(qkv), self.spec.head_dim))
        return attended.view(len(qkv), self.spec.num_heads, -1)

    def attend(self) -> torch.Tensor:
        """Of the last query_lens tokens of each sequence."""
        lens = zip(self.query_lens, self.seq_lens, strict=True)
        return self.step([(seq, end - count, end) for seq, (count, end) in enumerate(lens)])

    def expected(self) -> torch.Tensor:
        """What `attend` must give: one query, one head, one key at a time, in fp32."""
        rows = []
        num_heads, num_kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        for count, qkv in zip(self.query_lens, self.qkv, strict=True):
            for last in range(len(qkv) - count, len(qkv)):
                rows.append(
                    brute_force(
                        qkv[last, :num_heads].float(),
                        qkv[: last + 1, num_heads : num_heads + num_kv_heads].float(),
                        qkv[: last + 1, num_heads + num_kv_heads :].float(),
                        scale=self.spec.scale,
                        window=self.spec.windows[0],
                    )
                )
        return torch.stack(rows)


def brute_force(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int
) -> torch.Tensor:
    """One query token: q is [num_heads, head_dim], keys and values [num_keys, num_kv_heads, …]."""
    oldest = max(0, len(keys) - window) if window else 0
    out = torch.empty(q.shape)
    for head, query in enumerate(q):
        kv_head = head * keys.shape[1] // len(q)
        weights = torch.softmax(keys[oldest:, kv_head] @ query * scale, dim=0)
        out[head] = weights @ values[oldest:, kv_head]
    return out


def no_rotation(num_tokens: int, rotary_dim: int) -> Rotary:
    shape = (num_tokens, 1, rotary_dim)
    return Rotary(torch.ones(shape), torch.zeros(shape))
