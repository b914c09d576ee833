"""A product in int8 that screens tokens, and what comes before and after it.

See `pagoda_runtime.layers.screen`.
"""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.packing import pack
from pagoda_kernels.cpu.panels import GROUP_SIZE, INT8
from pagoda_kernels.cpu.screened_argmax.kernel import (
    CHUNK_GROUPS,
    choose,
    find_largest,
    quantize_rows,
)
from pagoda_kernels.cpu.screened_argmax.reference import ROW_OFFSET, Quantized

__all__ = ["ROW_OFFSET", "Int8Table", "Quantized", "choose_tokens", "quantize"]


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
