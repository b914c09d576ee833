"""What every implementation of attention over a paged KV cache is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of a model's layers.

    windows: one for each layer: a query at position p sees positions above p - window; 0: all.
    scale: factor on q·k, above 0.
    dtype, kv_dtype: of the queries, and of the cached keys and values.
    block_size: tokens of a block.
    is_deterministic: let the bits of a token's result depend on its own sequence alone, not on the
        step's other tokens nor on how prompts are cut; slower.
    Raises: ValueError: a value that no backend computes with.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    device: torch.device
    is_deterministic: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of {self.num_kv_heads}."
            )
        if self.scale <= 0.0:
            raise ValueError(f"scale is {self.scale}; it must be above 0.")
        if self.dtype is not self.kv_dtype:
            raise ValueError(
                f"dtype is {self.dtype} and kv_dtype {self.kv_dtype}; both must agree."
            )

    @property
    def qkv_size(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class Rotary(NamedTuple):
    """What the heads of a step's tokens are rotated by: see `pagoda_kernels.rotate_and_store`."""

    cos: torch.Tensor
    sin: torch.Tensor

    def of_first(self, num_tokens: int) -> Rotary:
        return Rotary(self.cos[:num_tokens], self.sin[:num_tokens])


class HeadNorm(NamedTuple):
    """The norms of a layer's heads: see `pagoda_kernels.rotate_and_store`."""

    weight: torch.Tensor
    floor: torch.Tensor


class AttentionPlan(ABC):
    """The sequences of one step, as a backend has prepared for them."""

    def __init__(self, spec: AttentionSpec, num_tokens: int) -> None:
        self.spec, self.num_tokens = spec, num_tokens

    @abstractmethod
    def attend(
        self, layer: int, qkv: torch.Tensor, rotary: Rotary, norm: HeadNorm | None = None
    ) -> torch.Tensor:
        """Norm and rotate the heads of q and k, store k and v, and attend to all that is stored.

        Args:
            layer: an index into the spec's windows.
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: each token's
                heads of q, of k, of v, for all sequences one after the other; overwritten. Padding
                tokens may follow.
            rotary: of as many tokens.
            norm: None: heads are not normed.
        Returns: [num_tokens, num_heads * head_dim] in the spec's dtype; padding tokens are zero.
        Raises: ValueError: shapes or dtypes do not agree.
        """

    def _require_agreement(self, qkv: torch.Tensor) -> None:
        size, dtype = self.spec.qkv_size, self.spec.dtype
        if qkv.shape[1:] != (size,) or len(qkv) < self.num_tokens or qkv.dtype is not dtype:
            raise ValueError(
                f"qkv is {list(qkv.shape)} in {qkv.dtype}; the step was planned for "
                f"[{self.num_tokens}, {size}] in {dtype}."
            )


class AttentionBackend(ABC):
    """Owns the keys and values of all layers, and what attends to them.

    A layer's are in kv_caches: [num_blocks, block_size, 2, num_kv_heads, head_dim], keys at index 0
    and values at 1. A token's lie side by side, so one write stores both.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.kv_caches: list[torch.Tensor] = []

    @property
    def block_bytes(self) -> int:
        """Of one block, over all layers."""
        spec = self.spec
        numbers = spec.block_size * 2 * spec.num_kv_heads * spec.head_dim
        return len(spec.windows) * numbers * spec.kv_dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        """Make room for so many blocks, block 0 among them, in the place of those of before.

        Not cleared: unused slots are never read, and untouched pages take no memory.
        Raises: RuntimeError, torch.OutOfMemoryError: there is not enough memory.
        """
        spec = self.spec
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        self.kv_caches = [
            torch.empty(shape, dtype=spec.kv_dtype, device=spec.device) for _ in spec.windows
        ]

    @abstractmethod
    def plan(
        self, query_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> AttentionPlan:
        """Prepare one step, for all its layers.

        Args:
            query_lens: [num_seqs] int64, tokens of each sequence in this step: its last ones.
            seq_lens: [num_seqs] int64, tokens of each sequence so far, with this step's.
            block_table: [num_seqs, max_blocks] int32 on the host; entries past a sequence's last
                block are not read, nor those whose tokens no window shows.
        Raises: IndexError: a token has no block, or one outside the cache.
        """

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy block sources[i] to block targets[i] in every layer, for sequences that part.

        All blocks are read before any is written, so a target may be the source of another copy.
        Raises: ValueError: the lengths differ, a target repeats, or a block does not exist.
        """
        if len(sources) != len(targets):
            raise ValueError(f"There are {len(sources)} sources and {len(targets)} targets.")
        if len(set(targets)) != len(targets):
            raise ValueError(f"targets {list(targets)} repeat a block.")
        num_blocks = len(self.kv_caches[0])
        for block in (*sources, *targets):
            if not 0 <= block < num_blocks:
                raise ValueError(f"Block {block} does not exist; the cache has {num_blocks}.")
        from_blocks = torch.tensor(sources, device=self.spec.device)
        to_blocks = torch.tensor(targets, device=self.spec.device)
        for kv_cache in self.kv_caches:
            kv_cache.index_copy_(0, to_blocks, kv_cache.index_select(0, from_blocks))
