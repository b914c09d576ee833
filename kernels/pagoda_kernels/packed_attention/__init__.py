"""Attention of whole texts that lie one after the other, without a KV cache.

Nothing is padded where a text is a slice of its own: on a CPU, and where a result's bits may not
depend on its neighbours. Elsewhere texts of about one length are attended to at once, because a
launch costs more than padding does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pagoda_kernels.kv_cache import KVCache
from pagoda_kernels.paged_attention.backend import AttentionPlan, AttentionSpec, HeadNorm, Rotary
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_kernels.transfer import all_to_device

# Queries of a text that a window is laid over at once: fewer read fewer keys in vain, more are
# fewer products.
_WINDOW_QUERIES = 128


@dataclass(frozen=True, slots=True)
class _Padded:
    """Texts of about one length, each padded to the longest by its last token.

    tokens: [num_texts, longest] int64: where each token lies.
    is_key: [num_texts, 1, 1, longest] bool: whether it is not padding.
    own: [num_tokens] int64: the tokens, each once, and places, where the padded texts have them.
    masks: by window, [num_texts, 1, 1 or longest, longest] bool: what each query sees.
    """

    tokens: torch.Tensor
    is_key: torch.Tensor
    own: torch.Tensor
    places: torch.Tensor
    masks: dict[int, torch.Tensor] = field(default_factory=dict, init=False)


class PackedAttention:
    """Makes the plans of steps.

    Args:
        spec: kv_dtype and block_size do not matter. With windows of w and no causality a query at
            position p sees positions above p - w and below p + w.
        is_causal: whether a query sees no later position.
    Raises: ValueError: scores are more than q·k.
    """

    def __init__(self, spec: AttentionSpec, *, is_causal: bool) -> None:
        if not spec.is_plain:
            raise ValueError("Soft caps, ALiBi and sinks need a paged KV cache.")
        self.spec, self.is_causal = spec, is_causal

    def plan(self, lens: np.ndarray) -> PackedPlan:
        """lens: [num_texts] int64, tokens of each text, 1 at least."""
        return PackedPlan(self, lens)


class PackedPlan(AttentionPlan):
    """The texts of one step."""

    def __init__(self, attention: PackedAttention, lens: np.ndarray) -> None:
        super().__init__(attention.spec, int(lens.sum()))
        self.is_causal, self.device = attention.is_causal, attention.spec.device
        firsts = np.cumsum(lens) - lens
        self._slices: list[slice] = []
        self._padded: list[_Padded] = []
        if self.device.type == "cpu" or self.spec.is_deterministic:
            pairs = zip(firsts.tolist(), lens.tolist(), strict=True)
            self._slices = [slice(first, first + count) for first, count in pairs]
        else:
            self._padded = self._pad(firsts, lens)
        self._masks: dict[tuple[int, int, int, int], torch.Tensor] = {}

    @cached_property
    def _slots(self) -> torch.Tensor:
        return torch.arange(self.num_tokens, device=self.device)

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        norm: HeadNorm | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the contract has it; a rotary of no dimensions rotates nothing."""
        self._require_agreement(qkv)
        spec, window = self.spec, self.spec.windows[layer]
        heads = qkv.view(self.num_tokens, -1, spec.head_dim)
        q, (k, v) = heads[:, : spec.num_heads], heads[:, spec.num_heads :].chunk(2, dim=1)
        if rotary.cos.shape[-1] or norm is not None:
            shape = (1, self.num_tokens, 2, spec.num_kv_heads, spec.head_dim)
            rotated = qkv.new_empty(shape)
            rotate_and_store(heads, *rotary, KVCache(rotated, None), self._slots, *(norm or ()))
            k, v = rotated[0].unbind(1)
        group = spec.num_heads // spec.num_kv_heads
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for text in self._slices:
            self._attend_text(q[text], k[text], v[text], window, out[text])
        for padded in self._padded:
            self._attend_padded((q, k, v), padded, window, out)
        return out.flatten(1)

    def _attend_text(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, out: torch.Tensor
    ) -> None:
        """q, k, v, out: [num_tokens, num_heads, head_dim]"""
        num_tokens = len(q)
        is_windowed = 0 < window < num_tokens
        size = max(_WINDOW_QUERIES, window) if is_windowed else num_tokens
        for first in range(0, num_tokens, size):
            last = min(first + size, num_tokens)
            low, high = 0, num_tokens
            if is_windowed:
                low = max(0, first - window + 1)
                high = last if self.is_causal else min(num_tokens, last + window - 1)
            mask = (
                self._mask(last - first, high - low, first - low, window) if is_windowed else None
            )
            found = scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                k[low:high].transpose(0, 1)[None],
                v[low:high].transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=self.is_causal and not is_windowed,
                scale=self.spec.scale,
            )
            out[first:last] = found[0].transpose(0, 1)

    def _attend_padded(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        padded: _Padded,
        window: int,
        out: torch.Tensor,
    ) -> None:
        longest = padded.tokens.shape[1]
        mask = padded.masks.get(window)
        if mask is None:
            mask = padded.is_key
            if self.is_causal or 0 < window < longest:
                seen = self._mask(longest, longest, 0, window if window < longest else 0)
                mask = mask & seen
            padded.masks[window] = mask
        q, k, v = (x[padded.tokens].transpose(1, 2) for x in qkv)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.spec.scale)
        found = found.transpose(1, 2).flatten(0, 1)
        out.index_copy_(0, padded.own, found.index_select(0, padded.places))

    def _mask(self, num_queries: int, num_keys: int, first: int, window: int) -> torch.Tensor:
        """[num_queries, num_keys] bool: which keys each query sees; it stands at key first + i."""
        key = (num_queries, num_keys, first, window)
        found = self._masks.get(key)
        if found is None:
            keys = torch.arange(num_keys, device=self.device)
            distances = keys - torch.arange(first, first + num_queries, device=self.device)[:, None]
            found = torch.ones_like(distances, dtype=torch.bool)
            if self.is_causal:
                found &= distances <= 0
            if window:
                found &= distances.abs() < window
            self._masks[key] = found
        return found

    def _pad(self, firsts: np.ndarray, lens: np.ndarray) -> list[_Padded]:
        """Texts whose lengths are less than twice each other's together; all in one transfer."""
        sizes, arrays = np.ceil(np.log2(lens)), list[np.ndarray]()
        for size in np.unique(sizes):
            some_lens, some_firsts = lens[sizes == size, None], firsts[sizes == size, None]
            offsets = np.arange(some_lens.max())
            is_key = offsets < some_lens
            tokens = some_firsts + np.minimum(offsets, some_lens - 1)
            arrays += [tokens, is_key[:, None, None], tokens[is_key], np.flatnonzero(is_key)]
        sent = all_to_device(arrays, self.device)
        return [_Padded(*sent[at : at + 4]) for at in range(0, len(sent), 4)]
