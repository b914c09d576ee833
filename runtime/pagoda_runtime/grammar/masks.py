"""What may follow in sequences with grammars, as bits of tokens; numpy comes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

if TYPE_CHECKING:
    from pagoda_runtime.grammar.compiler import Matcher


class MaskFiller:
    """Computes masks for one tokenizer.

    Args:
        vocab_size: tokens of the model, which may be more than the tokenizer's, or fewer.
        end_token_ids: the model's; they may come wherever a grammar may end.
    """

    def __init__(
        self, tokenizer: LLTokenizer, vocab_size: int, end_token_ids: Sequence[int]
    ) -> None:
        self._executor = LLExecutor()
        self._num_words = -(-tokenizer.vocab_size // 32)
        self._num_bytes = 4 * -(-vocab_size // 32)
        self._eos_token_id, self._end_token_ids = tokenizer.eos_token, end_token_ids
        is_known = np.arange(32 * self._num_words) < vocab_size
        self._known = np.packbits(is_known, bitorder="little")

    def fill(self, matchers: Sequence[Matcher]) -> list[bytes]:
        """`ScheduledRow.mask` for each of them."""
        masks = np.zeros((len(matchers), self._num_words), np.int32)
        inner = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, inner, masks)
        bits = masks.view(np.uint8)
        bits &= self._known
        for matcher, row in zip(matchers, bits, strict=True):
            self._mark_ends(row, ignore_eos=matcher.ignore_eos)
            if not row.any():
                # Some token has to come; its matcher will not take it.
                row[:] = self._known
        found = [row[: self._num_bytes].tobytes() for row in bits]
        for mask in found:
            # A sampler asks for it, which has no model beside it; a text keeps it.
            hash(mask)
        return found

    def _mark_ends(self, mask: np.ndarray, *, ignore_eos: bool) -> None:
        """llguidance marks one end token, where the grammar may end: mark all, or none."""
        byte, bit = divmod(self._eos_token_id, 8)
        if not mask[byte] >> bit & 1:
            return
        if not ignore_eos and self._end_token_ids:
            for token_id in self._end_token_ids:
                mask[token_id // 8] |= 1 << token_id % 8
            return
        mask[byte] &= ~(1 << bit) & 0xFF
        if not mask.any():
            mask[byte] = 1 << bit
