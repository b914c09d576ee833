"""The specification of `pagoda_kernels.cpu.int8_argmax` in plain torch; nothing is checked."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pagoda_kernels.cpu.int8_argmax.kernel import CHUNK_GROUPS
from pagoda_kernels.cpu.panels import GROUP_SIZE

ROW_OFFSET = 128
"""What is added to a row's whole numbers: the processor multiplies unsigned by signed bytes."""


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


def rotate(x: torch.Tensor, rotation_size: int) -> torch.Tensor:
    """[num_rows, size]: x, each rotation_size numbers multiplied by Hadamard's matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < rotation_size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (x.float().view(len(x), -1, rotation_size) @ matrix).flatten(1)


def quantize_reference(matrix: torch.Tensor, rotation_size: int, offset: int = 0) -> Quantized:
    # The rotation makes numbers larger by the square root of its size.
    numbers = rotate(matrix, rotation_size) * rotation_size**-0.5
    scales = numbers.abs().amax(-1).clamp(min=1e-30) / 127
    numbers /= scales[:, None]
    whole = numbers.round()
    squares = torch.stack([(numbers - whole).square().sum(-1), whole.square().sum(-1)], -1)
    dtype = torch.uint8 if offset else torch.int8
    return Quantized((whole + offset).to(dtype), scales, whole.sum(-1).int(), squares)


def find_largest_reference(rows: torch.Tensor, table: Quantized) -> torch.Tensor:
    """Columns without a token have -inf; the kernel gives them less than any logit."""
    logits = (rows.double() - ROW_OFFSET) @ table.integers.double().T * table.scales.double()
    return largest_of_columns(logits)


def largest_of_columns(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_chunks, GROUP_SIZE] fp32: of [num_rows, vocab_size] logits."""
    missing = -logits.shape[1] % (CHUNK_GROUPS * GROUP_SIZE)
    padded = torch.nn.functional.pad(logits.float(), (0, missing), value=-torch.inf)
    return padded.view(len(logits), -1, CHUNK_GROUPS, GROUP_SIZE).amax(2)


def choose_tokens_reference(
    hidden: torch.Tensor,
    table: torch.Tensor,
    largest: torch.Tensor,
    errors: torch.Tensor,
    most_candidates: int,
) -> torch.Tensor:
    best = largest.flatten(1).amax(1)
    may_be = largest >= (best - 2 * errors)[:, None, None]
    candidates = may_be[:, :, None].expand(-1, -1, CHUNK_GROUPS, -1).flatten(1)[:, : len(table)]
    exact = (hidden.float() @ table.float().T).masked_fill(~candidates, -torch.inf)
    counts = candidates.sum(1)
    tokens = exact.argmax(1)
    # Not a number: there is no largest.
    tokens[counts == 0] = len(table) - 1
    tokens[counts > most_candidates] = -1
    return tokens
