"""What every implementation of attention over a paged KV cache is asked for."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pagoda_kernels.copy_blocks import copy_blocks
from pagoda_kernels.kv_cache import LARGEST, KVCache, make_kv_cache, token_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of a model's layers.

    windows: one for each layer: a query at position p sees positions above p - window; 0: all.
    scale: factor on q·k, above 0.
    dtype, kv_dtype: of the queries, and of the cached keys and values: the same, or one of 8 bits,
        see `pagoda_kernels.kv_cache`.
    block_size: tokens of a block.
    is_deterministic: let the bits of a token's result depend on its own sequence alone, not on the
        step's other tokens nor on how prompts are cut; slower.
    soft_cap: c: scores s become c * tanh(s / c); 0: they stay.
    alibi_slopes: of each head, by which a score grows with the key's position; (): none.
    has_sinks: whether each head has a score of its own, of no key, that takes a part of the weight.
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
    soft_cap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()
    has_sinks: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of {self.num_kv_heads}."
            )
        if self.scale <= 0.0:
            raise ValueError(f"scale is {self.scale}; it must be above 0.")
        if self.kv_dtype not in (self.dtype, *LARGEST):
            raise ValueError(
                f"dtype is {self.dtype} and kv_dtype {self.kv_dtype}; they must agree, or kv_dtype "
                f"must be one of {list(LARGEST)}."
            )
        if self.soft_cap < 0.0:
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be 0 or above.")
        if self.alibi_slopes and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(
                f"There are {len(self.alibi_slopes)} alibi_slopes for {self.num_heads} heads."
            )

    @property
    def is_plain(self) -> bool:
        """Whether scores are q·k alone, times the scale."""
        return not (self.soft_cap or self.alibi_slopes or self.has_sinks)

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
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Norm and rotate the heads of q and k, store k and v, and attend to all that is stored.

        Args:
            layer: an index into the spec's windows.
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: each token's
                heads of q, of k, of v, for all sequences one after the other; overwritten. Padding
                tokens may follow.
            rotary: of as many tokens.
            norm: None: heads are not normed.
            sinks: [num_heads] fp32, if the spec has them.
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
    """Owns the keys and values of all layers, in kv_caches, and what attends to them."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.kv_caches: list[KVCache] = []

    @property
    def block_bytes(self) -> int:
        """Of one block, over all layers."""
        spec = self.spec
        of_token = token_bytes(spec.num_kv_heads, spec.head_dim, spec.kv_dtype)
        return len(spec.windows) * spec.block_size * of_token

    def allocate(self, num_blocks: int) -> None:
        """Make room for so many blocks, block 0 among them, in the place of those of before.

        Raises: RuntimeError, torch.OutOfMemoryError: there is not enough memory.
        """
        spec = self.spec
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.kv_caches = [make_kv_cache(shape, spec.kv_dtype, spec.device) for _ in spec.windows]

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

    def plan_on_device(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> AttentionPlan:
        """Prepare every step of one token a row that these tensors will ever tell of.

        Their shapes and places count; their numbers are read when a layer attends. So the work of a
        step can be recorded, and done again for other rows after these tensors were changed.

        Args:
            seq_lens: [num_rows] int32 on the device, tokens of each row so far, with the step's.
            block_table: [num_rows, max_blocks] int32 on the device, as that of `plan`; a row that
                only pads the step has one token, in block 0.
        """
        raise NotImplementedError(f"{type(self).__name__} reads its tables on the host.")

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy block sources[i] to block targets[i] in every layer, for sequences that part.

        All blocks are read before any is written, so a target may be the source of another copy.
        Raises: ValueError: the lengths differ, a target repeats, or a block does not exist.
        """
        tensors = itertools.chain(*(kv_cache.tensors for kv_cache in self.kv_caches))
        copy_blocks(list(tensors), sources, targets)
