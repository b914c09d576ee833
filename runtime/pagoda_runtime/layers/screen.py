"""Find each row's likeliest token from int8 logits, and decide among the few left in fp32."""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.panels import BYTES_PER_STEP, INT8, has_panels
from pagoda_kernels.cpu.screened_argmax import (
    ROW_OFFSET,
    Int8Table,
    choose_tokens,
    quantize,
)
from pagoda_runtime.quantization.base import Product

# How many standard deviations of its error a logit may be off. The error is a sum over hidden_size
# of independent roundings, so it is close to normal: one in 1e9 likeliest tokens is missed.
_DEVIATIONS = 6.0
# A row with more than this is not worth it: all its logits are computed in bf16.
_MOST_CANDIDATES = 1 << 14
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
        product: with the table; for rows that int8 says too little about.
    """

    def __init__(self, table: torch.Tensor, product: Product) -> None:
        self.table, self.product = table, product
        self.rotation_size = min(_LARGEST_ROTATION, _power_of_two_in(table.shape[1]))
        rounded = quantize(table, self.rotation_size)
        self.int8_table = Int8Table(rounded)
        # A product is off by the roundings of a row's numbers, each times a weight, and by those of
        # the weights, each times a number: at most by those of the worst of all weights.
        variances = rounded.squares * (rounded.scales.square() / table.shape[1])[:, None]
        self.variances = variances.amax(0).flip(0) * _DEVIATIONS**2

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, the first of equals.

        Args:
            hidden: [num_rows, hidden_size] bf16, normalized.
        """
        hidden = hidden.contiguous()
        rows = quantize(hidden, self.rotation_size, ROW_OFFSET)
        largest = self.int8_table.find_largest(rows.integers)
        errors = torch.mv(rows.squares, self.variances).sqrt_()
        tokens = choose_tokens(hidden, self.table, largest, errors, _MOST_CANDIDATES)
        is_hard = tokens < 0
        if bool(is_hard.any()):
            tokens[is_hard] = self.product(hidden[is_hard]).argmax(-1)
        return tokens


def can_screen(table: torch.Tensor) -> bool:
    """Whether this processor multiplies such a table, rounded, in int8."""
    return table.shape[1] % BYTES_PER_STEP == 0 and has_panels(INT8)


def _power_of_two_in(number: int) -> int:
    """The largest that divides it."""
    return number & -number
