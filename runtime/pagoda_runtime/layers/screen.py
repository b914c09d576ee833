"""Find each row's likeliest token from int8 logits, and decide among the few left in fp32."""

from __future__ import annotations

import math

import torch

from pagoda_runtime.layers.linear import LinearMethod

# Tokens whose largest logit is found first; a smaller power of two if the vocabulary needs it.
_LARGEST_CHUNK = 512
_SMALLEST_CHUNK = 64
# How many standard deviations of its error a logit may be off. The error is a sum over hidden_size
# of independent roundings, so it is close to normal: one in 1e9 likeliest tokens is missed.
_DEVIATIONS = 6.0
_INT8_MAX = 127
# Relative: what bf16 may round away of a logit.
_BF16_ROUNDING = 2.0**-8
# Numbers rounded at once at load: torch splits larger operations among threads, and thousands of
# small splits take minutes where other processes want the same cores.
_NUMBERS_AT_ONCE = (1 << 15) - 1
_CANDIDATES_AT_ONCE = 1 << 12
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
        self.scales = torch.empty(vocab_size)
        # The largest mean square of a token's roundings, and of its rounded weights.
        self.error = self.power = 0.0
        rounded = torch.empty(table.shape, dtype=torch.int8)
        self.rotation = _hadamard(min(_LARGEST_ROTATION, _power_of_two_in(table.shape[1])))
        num_rows = max(1, _NUMBERS_AT_ONCE // table.shape[1])
        for first in range(0, vocab_size, num_rows):
            part = slice(first, first + num_rows)
            weight = self._rotate(table[part].float())
            scales = weight.abs().amax(-1).clamp_(min=1e-30).div_(_INT8_MAX)
            quotients = weight / scales[:, None]
            integers = _round(quotients)
            rounded[part] = integers.to(torch.int8)
            squares = scales.square()
            errors = (quotients - integers).square_().mean(-1).mul_(squares)
            powers = integers.square_().mean(-1).mul_(squares)
            self.scales[part] = scales
            self.error = max(self.error, errors.max().item())
            self.power = max(self.power, powers.max().item())
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zero_points = torch.zeros(vocab_size, dtype=torch.int32)

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, the first of equals.

        Args:
            hidden: [num_rows, hidden_size] bf16, normalized.
        """
        wide = hidden.float()
        x = self._rotate(wide)
        row_scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(_INT8_MAX)
        x.div_(row_scale)
        integers = _round(x)
        # In units of row_scale, as the logits.
        variance = x.square().sum(-1).mul_(self.error)
        variance.add_((x - integers).square_().sum(-1), alpha=self.power)
        error = variance.sqrt_().mul_(_DEVIATIONS)
        rows, token_ids = self._candidates(self._multiply(integers), error)
        if len(rows) <= _MOST_CANDIDATES:
            return self._decide(wide, rows, token_ids)
        is_hard = torch.bincount(rows, minlength=len(x)) > _MOST_CANDIDATES
        is_easy = ~is_hard[rows]
        winners = self._decide(wide, rows[is_easy], token_ids[is_easy])
        winners[is_hard] = self._argmax_of_all(hidden[is_hard])
        return winners

    def _argmax_of_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same result from bf16 logits, of which those that rounding made equal are left."""
        logits = self.method.apply(hidden, None)
        rows, token_ids = self._candidates(logits, torch.zeros(len(hidden)))
        return self._decide(hidden.float(), rows, token_ids)

    def _candidates(
        self, logits: torch.Tensor, error: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and tokens, in ascending order, whose logits may be the largest of their row.

        Args:
            logits: [num_rows, vocab_size] bf16.
            error: [num_rows] fp32: how far they may be off, before they were rounded to bf16.
        """
        chunks = logits.view(len(logits), -1, self.chunk)
        largest = chunks.amax(-1).float()
        best = largest.amax(-1)
        floor = best.sub(best.abs(), alpha=_BF16_ROUNDING).sub_(error, alpha=2.0)
        floor.sub_(floor.abs(), alpha=2 * _BF16_ROUNDING)
        rows, chunk_ids = (largest >= floor[:, None]).nonzero(as_tuple=True)
        near = chunks[rows, chunk_ids].float()
        kept, offsets = (near >= floor[rows, None]).nonzero(as_tuple=True)
        return rows[kept], chunk_ids[kept] * self.chunk + offsets

    def _rotate(self, vectors: torch.Tensor) -> torch.Tensor:
        """[num_vectors, hidden_size] fp32, times an orthogonal matrix; a new tensor."""
        return (vectors.view(-1, len(self.rotation)) @ self.rotation).view(vectors.shape)

    def _multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size] bf16, from whole numbers between -127 and 127."""
        # oneDNN's product of unsigned with signed bytes is the one that AVX512 has.
        zero_point = _INT8_MAX + 1
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            (integers + zero_point).to(torch.uint8),
            1.0,
            zero_point,
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

    def _decide(self, x: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Of the candidates (row, token), in ascending order, each row's best."""
        if torch.equal(rows, torch.arange(len(x))):
            return token_ids
        exact = torch.cat(
            [
                (self.table[some_ids].float() * x[some_rows]).sum(-1)
                for some_rows, some_ids in zip(
                    rows.split(_CANDIDATES_AT_ONCE),
                    token_ids.split(_CANDIDATES_AT_ONCE),
                    strict=True,
                )
            ]
        )
        best = torch.full((len(x),), -torch.inf).scatter_reduce_(0, rows, exact, "amax")
        is_best = exact == best[rows]
        winners = torch.full((len(x),), len(self.table) - 1)
        return winners.scatter_reduce_(0, rows[is_best], token_ids[is_best], "amin")


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


def _hadamard(size: int) -> torch.Tensor:
    """[size, size] fp32: an orthogonal matrix of numbers of one magnitude; size: a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        above, below = torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)
        matrix = torch.cat((above, below))
    return matrix / math.sqrt(size)


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, for |x| below 2**22; torch.round would be split among threads.

    fp32 numbers of this size have no bits left behind the point.
    """
    whole = 1.5 * 2.0**23
    return (x + whole).sub_(whole)
