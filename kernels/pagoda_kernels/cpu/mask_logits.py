"""Logits of the tokens that masks leave, on a CPU: see `pagoda_kernels.cpu.compiled`."""

from __future__ import annotations

import numpy as np

from pagoda_kernels.cpu.compiled import Kernel
from pagoda_kernels.cpu.formats import int32s, int64s, uint8s

_FORBIDDEN = np.float32(-np.inf).view(np.int32)


@Kernel
def mask_logits_cpu(
    logits_at: int, rows_at: int, masks_at: int, num_masks: int, vocab_size: int, num_bytes: int
) -> None:
    """Set logits of tokens whose bits are 0 to -inf, in place.

    Args:
        logits_at: of [any number of rows, vocab_size] fp32.
        rows_at: of [num_masks] int64, the rows that the masks are of.
        masks_at: of [num_masks, num_bytes] uint8, the first token's bit the lowest.
    """
    rows, masks = int64s(rows_at, (num_masks,)), uint8s(masks_at, (num_masks, num_bytes))
    for number in range(num_masks):
        # As bits: so all eight of a byte are one vector, without a branch.
        logits = int32s(logits_at + rows[number] * vocab_size * 4, (vocab_size,))
        for byte in range(vocab_size // 8):
            allowed = np.int32(masks[number, byte])
            for i in range(8):
                kept = -((allowed >> np.int32(i)) & np.int32(1))
                logits[byte * 8 + i] = (logits[byte * 8 + i] & kept) | (_FORBIDDEN & ~kept)
        for token_id in range(vocab_size // 8 * 8, vocab_size):
            if not (masks[number, token_id // 8] >> np.uint8(token_id % 8)) & np.uint8(1):
                logits[token_id] = _FORBIDDEN
