"""Find each row's likeliest token from int8 logits, and decide among the few left in fp32."""

from __future__ import annotations

import torch

from pagoda_kernels.screened_argmax import choose_tokens, quantize_rows, quantize_table
from pagoda_runtime.layers.linear import LinearMethod

# Tokens whose largest logit is found first; a smaller power of two if the vocabulary needs it.
_LARGEST_CHUNK = 512
_SMALLEST_CHUNK = 64
# How many standard deviations of its error a logit may be off. The error is a sum over hidden_size
# of independent roundings, so it is close to normal: one in 1e9 likeliest tokens is missed.
_DEVIATIONS = 6.0
_INT8_MAX = 127
# A row with more than this is not worth it: all its logits are computed in bf16.
_MOST_CANDIDATES = 1 << 12
# Numbers of a vector that are rotated together, or a smaller power of two if the vectors need it.
_LARGEST_ROTATION = 128


class Screen:
    """The vocabulary's matrix in int8, beside the plain one.

    A product in int8 reads half as much as one in bf16, and multiplies twice as fast. Its error is
    known up to its distribution: tokens that it leaves too far below the largest cannot be the
    likeliest, and the logits of the others are computed again from the plain matrix in fp32. So
    the result is more exact than the largest of bf16 logits, of which many are equal.

    Table and hidden states are rotated before they are rounded, which no product notices: a few
    large numbers among small ones, as hidden states have them, would leave the small ones too few
    of the 255 steps. It divides the error by 2.6 (Gemma 3 270M), and its likeliest tokens that have
    thousands of near rivals, 1.5 % after random prompts, then have at most 16.
    Source of the rotation: Ashkboos et al., QuaRot, 2024.

    Args:
        table: [vocab_size, hidden_size] bf16 on a CPU; kept, not copied.
        method: multiplies by the table; for rows that int8 says too little about.
    """

    def __init__(self, table: torch.Tensor, method: LinearMethod) -> None:
        vocab_size = len(table)
        self.table, self.method = table, method
        self.chunk = chunk_size(vocab_size)
        self.rotation_size = min(_LARGEST_ROTATION, _power_of_two_in(table.shape[1]))
        rounded, self.scales, self.error, self.power = quantize_table(table, self.rotation_size)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zero_points = torch.zeros(vocab_size, dtype=torch.int32)

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, the first of equals.

        Args:
            hidden: [num_rows, hidden_size] bf16, normalized.
        """
        hidden = hidden.contiguous()
        integers, deviations = quantize_rows(hidden, self.rotation_size, self.error, self.power)
        errors = deviations.mul_(_DEVIATIONS)
        winners = self._choose(hidden, self._multiply(integers), errors, _MOST_CANDIDATES)
        is_hard = winners < 0
        if bool(is_hard.any()):
            # The same result from bf16 logits, of which those that rounding made equal are left.
            hard = hidden[is_hard]
            logits = self.method.apply(hard, None)
            winners[is_hard] = self._choose(hard, logits, torch.zeros(len(hard)), len(self.table))
        return winners

    def _choose(
        self, hidden: torch.Tensor, logits: torch.Tensor, errors: torch.Tensor, most: int
    ) -> torch.Tensor:
        bits = logits.view(torch.int16)
        largest = bits.view(len(logits), -1, self.chunk).amax(-1)
        return choose_tokens(hidden, self.table, logits, largest, errors, most)

    def _multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size] bf16, from whole numbers plus 128."""
        # oneDNN's product of unsigned with signed bytes is the one that AVX512 has.
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            integers,
            1.0,
            _INT8_MAX + 1,
            self.packed,
            self.scales,
            self.zero_points,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        return product


def can_screen(table: torch.Tensor) -> bool:
    """Whether the vocabulary can be cut into chunks, and torch has the product in int8."""
    has_product = hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_product and chunk_size(len(table)) >= _SMALLEST_CHUNK


def chunk_size(vocab_size: int) -> int:
    """The largest power of two up to 512 that divides it."""
    return min(_LARGEST_CHUNK, _power_of_two_in(vocab_size))


def _power_of_two_in(number: int) -> int:
    """The largest that divides it."""
    return number & -number
