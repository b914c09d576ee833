"""The largest logit of each row, searched in int8 and decided in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pagoda_kernels.cpu.int8_argmax.kernel import CHUNK_GROUPS, choose, find_largest, quantize_rows
from pagoda_kernels.cpu.packing import make_panels, pack
from pagoda_kernels.cpu.panels import BYTES_PER_STEP, GROUP_SIZE, INT8, has_panels

ROW_OFFSET = 128
"""What is added to a row's whole numbers: the processor multiplies unsigned by signed bytes."""

# How many standard deviations of its error a logit may be off. The error is a sum over hidden_size
# of independent roundings, so it is close to normal: one largest in 1e9 is missed.
_DEVIATIONS = 6.0
# A row with more than this is not worth it: all its logits are computed in bf16.
_MOST_CANDIDATES = 1 << 14
# Numbers of a vector that are rotated together, or a smaller power of two if the vectors need it.
_LARGEST_ROTATION = 128


class Quantized(NamedTuple):
    """A matrix in whole numbers between -127 and 127, each row with a scale of its own."""

    integers: torch.Tensor
    """[num_rows, size] int8, or uint8 with ROW_OFFSET added."""
    scales: torch.Tensor
    """[num_rows] fp32."""
    sums: torch.Tensor
    """[num_rows] int32, of each row's whole numbers."""
    squares: torch.Tensor
    """[num_rows, 2] fp32: sums of squares of the roundings, and of the whole numbers."""


def has_int8_argmax(table: torch.Tensor) -> bool:
    """Whether this processor multiplies such a table in int8."""
    is_bf16 = table.dtype is torch.bfloat16 and table.device.type == "cpu"
    return is_bf16 and table.shape[1] % BYTES_PER_STEP == 0 and has_panels(INT8)


class Int8Argmax:
    """The token of each row's largest logit, from logits in int8, and of the few left in fp32.

    A product in int8 reads half as much as one in bf16, and multiplies twice as fast. Its error is
    known up to its distribution: tokens that it leaves too far below the largest cannot be the
    argmax, and the logits of the others are computed again from the plain matrix in fp32. So
    the result is more exact than the largest of bf16 logits, of which many are equal.

    Table and hidden states are rotated before they are rounded, which no product notices: a few
    large numbers among small ones, as hidden states have them, would leave the small ones too few
    of the 255 steps. It divides the error by 2.6 (Gemma 3 270M), and rows whose largest logit has
    thousands of near rivals, 1.5 % after random prompts, then have at most 16.
    Source of the rotation: Ashkboos et al., QuaRot, 2024.

    Args:
        table: [vocab_size, hidden_size] bf16 on a CPU; kept, not copied.
        product: with the table; for rows that int8 says too little about.
    """

    def __init__(
        self, table: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.table, self.product = table, product
        size = table.shape[1]
        # The largest power of two that divides it.
        self.rotation_size = min(_LARGEST_ROTATION, size & -size)
        rounded = quantize(table, self.rotation_size)
        self.int8_table = Int8Table(rounded)
        # A product is off by the roundings of a row's numbers, each times a weight, and by those of
        # the weights, each times a number: at most by those of the worst of all weights.
        variances = rounded.squares * (rounded.scales.square() / size)[:, None]
        self.variances = variances.amax(0).flip(0) * _DEVIATIONS**2

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
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


def quantize(matrix: torch.Tensor, rotation_size: int, offset: int = 0) -> Quantized:
    """Rotate rows and round them to whole numbers, each row by a scale of its own.

    Args:
        matrix: [num_rows, size] bf16 on a CPU, contiguous.
        rotation_size: a power of two that divides size: so many numbers at a time are multiplied by
            a Hadamard matrix.
        offset: what is added to the whole numbers: 0, or ROW_OFFSET, which makes them unsigned.
    """
    if matrix.dtype is not torch.bfloat16 or not matrix.is_contiguous():
        raise ValueError("matrix must be bf16 and contiguous.")
    num_rows, size = matrix.shape
    if size % rotation_size:
        raise ValueError(f"rotation_size is {rotation_size}; it must divide {size}.")
    rounded = Quantized(
        torch.empty(num_rows, size, dtype=torch.uint8 if offset else torch.int8),
        torch.empty(num_rows),
        torch.empty(num_rows, dtype=torch.int32),
        torch.empty(num_rows, 2),
    )
    quantize_rows(matrix, offset, *rounded, num_rows, size, rotation_size)
    return rounded


class Int8Table:
    """A rounded table in panels, for products with rounded rows; the table is copied."""

    def __init__(self, table: Quantized) -> None:
        num_rows, row_size = table.integers.shape
        self._panels = make_panels(-(-num_rows // GROUP_SIZE), row_size, INT8)
        pack(table.integers, self._panels)
        size = len(self._panels) * GROUP_SIZE
        # Rows are whole numbers plus 128. What fills the last group is less than any product.
        self._offsets = torch.full((size,), torch.iinfo(torch.int32).min, dtype=torch.int32)
        self._offsets[: len(table.sums)] = table.sums * -ROW_OFFSET
        self._scales = torch.full((size,), float(table.scales.max()))
        self._scales[: len(table.scales)] = table.scales

    def find_largest(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, num_chunks, GROUP_SIZE] fp32: the largest logit of each column of each chunk.

        Column c of a chunk that begins with token t has the tokens t + c, t + c + GROUP_SIZE, …

        Args:
            rows: [num_rows, hidden_size] uint8, of `quantize` with ROW_OFFSET.
        """
        num_rows, size = rows.shape
        num_groups, num_steps, _, numbers = self._panels.shape
        fits = rows.dtype is torch.uint8 and size == num_steps * numbers
        if not fits or not rows.is_contiguous():
            raise ValueError(
                f"rows must be uint8, contiguous and of {num_steps * numbers} numbers."
            )
        largest = torch.empty(num_rows, -(-num_groups // CHUNK_GROUPS), GROUP_SIZE)
        find_largest(
            self._panels, num_groups, rows, num_rows, size, self._offsets, self._scales, largest
        )
        return largest


def choose_tokens(
    hidden: torch.Tensor,
    table: torch.Tensor,
    largest: torch.Tensor,
    errors: torch.Tensor,
    most_candidates: int,
) -> torch.Tensor:
    """[num_rows] int64: of the tokens whose logits may be a row's largest, the one that is.

    Their exact logits are computed from hidden and table in fp32; of equals the first wins.

    Args:
        hidden: [num_rows, hidden_size] bf16 on a CPU, contiguous.
        table: [vocab_size, hidden_size] bf16, contiguous.
        largest: of `Int8Table.find_largest`, contiguous, in a unit of each row's own.
        errors: [num_rows] fp32: how far those logits may be off.
        most_candidates: the result is -1 for rows that have more.
    """
    num_rows, size = hidden.shape
    if hidden.dtype is not torch.bfloat16 or table.dtype is not torch.bfloat16:
        raise ValueError("hidden and table must be bf16.")
    if not all(t.is_contiguous() for t in (hidden, table, largest)):
        raise ValueError("hidden, table and largest must be contiguous.")
    num_chunks = -(-len(table) // (CHUNK_GROUPS * GROUP_SIZE))
    if largest.shape != (num_rows, num_chunks, GROUP_SIZE) or table.shape[1] != size:
        raise ValueError(f"largest is {list(largest.shape)}; the table is {list(table.shape)}.")
    if errors.shape != (num_rows,):
        raise ValueError(f"errors is {list(errors.shape)}; there are {num_rows} rows.")
    tokens = torch.empty(num_rows, dtype=torch.int64)
    choose(
        hidden,
        table,
        largest,
        errors,
        tokens,
        num_rows,
        size,
        len(table),
        num_chunks,
        min(most_candidates, len(table)),
    )
    return tokens
