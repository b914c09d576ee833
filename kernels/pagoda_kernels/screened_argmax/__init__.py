"""Before and after a product in int8 that screens tokens: see `pagoda_runtime.layers.screen`."""

from __future__ import annotations

import torch

from pagoda_kernels.screened_argmax.cpu import choose, quantize, quantize_weights

__all__ = ["choose_tokens", "quantize_rows", "quantize_table"]


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
    quantize(
        hidden.data_ptr(),
        integers.data_ptr(),
        deviations.data_ptr(),
        num_rows,
        size,
        rotation_size,
        error,
        power,
    )
    return integers, deviations


def quantize_table(
    table: torch.Tensor, rotation_size: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Rotate a table's rows as `quantize_rows` does, and round them, each by a scale of its own.

    Args:
        table: [vocab_size, hidden_size] bf16 on a CPU, contiguous.
    Returns: [vocab_size, hidden_size] int8, [vocab_size] fp32 scales, and of all rows the largest
        mean square of the roundings, and of the rounded weights.
    """
    if table.dtype is not torch.bfloat16 or not table.is_contiguous():
        raise ValueError("table must be bf16 and contiguous.")
    vocab_size, size = table.shape
    if size % rotation_size:
        raise ValueError(f"rotation_size is {rotation_size}; it must divide {size}.")
    integers = torch.empty(vocab_size, size, dtype=torch.int8)
    scales = torch.empty(vocab_size)
    error, power = quantize_weights(
        table.data_ptr(), integers.data_ptr(), scales.data_ptr(), vocab_size, size, rotation_size
    )
    return integers, scales, float(error), float(power)


def choose_tokens(
    hidden: torch.Tensor,
    table: torch.Tensor,
    logits: torch.Tensor,
    largest: torch.Tensor,
    errors: torch.Tensor,
    most_candidates: int,
) -> torch.Tensor:
    """[num_rows] int64: of the tokens whose logits may be a row's largest, the one that is.

    Their exact logits are computed from hidden and table in fp32; of equals the first wins.

    Args:
        hidden: [num_rows, hidden_size] bf16 on a CPU, contiguous.
        table: [vocab_size, hidden_size] bf16, contiguous.
        logits: [num_rows, vocab_size] bf16, contiguous, in a unit of each row's own.
        largest: [num_rows, num_chunks] int16, contiguous: of each chunk of a row, the largest of
            the logits' bits, seen as whole numbers: a chunk's largest logit if that is positive.
            torch finds these 12 times as fast as the largest of bf16 numbers.
        errors: [num_rows] fp32: how far logits may be off, before they were rounded to bf16.
        most_candidates: the result is -1 for rows that have more.
    """
    num_rows, size = hidden.shape
    if any(t.dtype is not torch.bfloat16 for t in (hidden, table, logits)):
        raise ValueError("hidden, table and logits must be bf16.")
    if not all(t.is_contiguous() for t in (hidden, table, logits, largest)):
        raise ValueError("hidden, table, logits and largest must be contiguous.")
    if logits.shape != (num_rows, len(table)) or table.shape[1] != size:
        raise ValueError(f"logits are {list(logits.shape)}; the table is {list(table.shape)}.")
    if (
        largest.dtype is not torch.int16
        or len(largest) != num_rows
        or len(table) % largest.shape[1]
        or errors.shape != (num_rows,)
    ):
        raise ValueError(f"largest is {list(largest.shape)} and errors {list(errors.shape)}.")
    tokens = torch.empty(num_rows, dtype=torch.int64)
    choose(
        hidden.data_ptr(),
        table.data_ptr(),
        logits.data_ptr(),
        largest.data_ptr(),
        errors.data_ptr(),
        tokens.data_ptr(),
        num_rows,
        size,
        len(table),
        largest.shape[1],
        min(most_candidates, len(table)),
    )
    return tokens
