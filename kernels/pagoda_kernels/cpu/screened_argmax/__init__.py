"""A product in int8 that screens tokens, and what comes before and after it.

See `pagoda_runtime.layers.screen`.
"""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.packing import pack
from pagoda_kernels.cpu.panels import GROUP_SIZE, INT8
from pagoda_kernels.cpu.screened_argmax.kernel import (
    CHUNK_GROUPS,
    PART_ROWS,
    choose,
    find_largest,
    quantize,
    quantize_weights,
)
from pagoda_kernels.cpu.screened_argmax.reference import ROW_OFFSET, RoundedTable

__all__ = ["Int8Table", "RoundedTable", "choose_tokens", "quantize_rows", "quantize_table"]


def quantize_rows(
    hidden: torch.Tensor, rotation_size: int, error: float, power: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate rows and round them to whole numbers between -127 and 127.

    Args:
        hidden: [num_rows, hidden_size] bf16 on a CPU, contiguous.
        rotation_size: a power of two that divides hidden_size: so many numbers at a time are
            multiplied by a Hadamard matrix.
        error, power: the mean square of the roundings of a weight, and of a rounded weight.
    Returns: [num_rows, hidden_size] uint8, whole numbers plus 128; and [num_rows] fp32, the
        standard deviation of their products with a row of weights, in units of the row's own scale.
    """
    if hidden.dtype is not torch.bfloat16 or not hidden.is_contiguous():
        raise ValueError("hidden must be bf16 and contiguous.")
    num_rows, size = hidden.shape
    if size % rotation_size:
        raise ValueError(f"rotation_size is {rotation_size}; it must divide {size}.")
    integers = torch.empty(num_rows, size, dtype=torch.uint8)
    deviations = torch.empty(num_rows)
    quantize(hidden, integers, deviations, num_rows, size, rotation_size, error, power)
    return integers, deviations


def quantize_table(table: torch.Tensor, rotation_size: int) -> tuple[RoundedTable, float, float]:
    """Rotate a table's rows as `quantize_rows` does, and round them, each by a scale of its own.

    Args:
        table: [vocab_size, hidden_size] bf16 on a CPU, contiguous.
    Returns: the rounded table, and of all rows the largest mean square of the roundings, and of
        the rounded weights.
    """
    if table.dtype is not torch.bfloat16 or not table.is_contiguous():
        raise ValueError("table must be bf16 and contiguous.")
    vocab_size, size = table.shape
    if size % rotation_size:
        raise ValueError(f"rotation_size is {rotation_size}; it must divide {size}.")
    integers = torch.empty(vocab_size, size, dtype=torch.int8)
    scales, sums = torch.empty(vocab_size), torch.empty(vocab_size, dtype=torch.int32)
    worst = torch.empty(-(-vocab_size // PART_ROWS), 2)
    quantize_weights(table, integers, scales, sums, worst, vocab_size, size, rotation_size)
    error, power = worst.amax(0).tolist()
    return RoundedTable(integers, scales, sums), error, power


class Int8Table:
    """A rounded table in panels, for products with rounded rows; the table is copied."""

    def __init__(self, table: RoundedTable) -> None:
        self._panels = pack(table.integers, INT8)
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
            rows: [num_rows, hidden_size] uint8, of `quantize_rows`.
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
