"""Find each row's likeliest token from int8 logits, and decide among the few left in fp32."""

from __future__ import annotations

import torch

from pagoda_runtime.layers.linear import LinearMethod

# Tokens whose largest logit is found first; a smaller power of two if the vocabulary needs it.
_LARGEST_CHUNK = 512
_SMALLEST_CHUNK = 64
# How many standard deviations of its error a logit may be off. The error is a sum over hidden_size
# of independent roundings, so it is close to normal: one in 1e9 likeliest tokens is missed.
_DEVIATIONS = 6.0
_INT8_MAX = 127
# Relative: what bf16 may round away of an int8 product.
_BF16_ROUNDING = 2.0**-8
# Numbers rounded at once at load: torch splits larger operations among threads, and thousands of
# small splits take minutes where other processes want the same cores.
_NUMBERS_AT_ONCE = (1 << 15) - 1
_CANDIDATES_AT_ONCE = 1 << 12
# A row with more than this is not worth it: all its logits are computed in bf16.
_MOST_CANDIDATES = 1 << 12
# Such a row, whose next token is all but open, is often followed by more of its kind. Both products
# together take longer than the one in bf16, so that some steps then do without int8: one, and twice
# as many each time that it was in vain, up to this.
_MOST_STEPS_IN_BF16 = 32


class Screen:
    """The vocabulary's matrix in int8, beside the plain one.

    A product in int8 reads half as much as one in bf16, and multiplies twice as fast. Its error is
    known up to its distribution: tokens that it leaves too far below the largest cannot be the
    likeliest, and the logits of the others are computed again from the plain matrix in fp32. So
    the result is more exact than the largest of bf16 logits, of which many are equal.

    Args:
        table: [vocab_size, hidden_size] bf16 on a CPU; kept, not copied.
        method: multiplies by the table; for rows that int8 says too little about.
    """

    def __init__(self, table: torch.Tensor, method: LinearMethod) -> None:
        vocab_size = len(table)
        self.table, self.method = table, method
        self.chunk = chunk_size(vocab_size)
        self.scales = torch.empty(vocab_size)
        # Per token: the mean square of its weights' roundings, and of its rounded weights.
        self.error, self.power = torch.empty(vocab_size), torch.empty(vocab_size)
        rounded = torch.empty(table.shape, dtype=torch.int8)
        num_rows = max(1, _NUMBERS_AT_ONCE // table.shape[1])
        for first in range(0, vocab_size, num_rows):
            part = slice(first, first + num_rows)
            weight = table[part].float()
            scales = weight.abs().amax(-1).clamp_(min=1e-30).div_(_INT8_MAX)
            quotients = weight / scales[:, None]
            integers = _round(quotients)
            rounded[part] = integers.to(torch.int8)
            squares = scales.square()
            self.scales[part] = scales
            self.error[part] = (quotients - integers).square_().mean(-1).mul_(squares)
            self.power[part] = integers.square_().mean(-1).mul_(squares)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zero_points = torch.zeros(vocab_size, dtype=torch.int32)
        self.chunk_error = self.error.view(-1, self.chunk).amax(-1)
        self.chunk_power = self.power.view(-1, self.chunk).amax(-1)
        self._steps_in_bf16, self._next_pause = 0, 1

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, the first of equals.

        Args:
            hidden: [num_rows, hidden_size] bf16, normalized.
        """
        if self._steps_in_bf16 > 0:
            self._steps_in_bf16 -= 1
            return self._argmax_of_all(hidden)
        x = hidden.float()
        row_scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(_INT8_MAX)
        x.div_(row_scale)
        integers = _round(x)
        logits = self._multiply(integers).view(len(x), -1, self.chunk)
        # In units of row_scale from here on.
        x_power = x.square().sum(-1, keepdim=True)
        x_error = (x - integers).square_().sum(-1, keepdim=True)
        largest = logits.amax(-1).float()
        margin = _margin(largest, x_power * self.chunk_error + x_error * self.chunk_power)
        floor = (largest - margin).amax(-1, keepdim=True)
        rows, chunks = (largest + margin >= floor).nonzero(as_tuple=True)
        near = logits[rows, chunks].float()
        variance = x_power[rows] * self.error.view(-1, self.chunk)[chunks]
        variance += x_error[rows] * self.power.view(-1, self.chunk)[chunks]
        kept, offsets = (near + _margin(near, variance) >= floor[rows]).nonzero(as_tuple=True)
        rows, token_ids = rows[kept], chunks[kept] * self.chunk + offsets
        is_hard = torch.bincount(rows, minlength=len(x)) > _MOST_CANDIDATES
        if not bool(is_hard.any()):
            self._next_pause = 1
            return self._decide(x, rows, token_ids)
        self._steps_in_bf16 = self._next_pause
        self._next_pause = min(2 * self._next_pause, _MOST_STEPS_IN_BF16)
        is_easy = ~is_hard[rows]
        winners = self._decide(x, rows[is_easy], token_ids[is_easy])
        winners[is_hard] = self._argmax_of_all(hidden[is_hard])
        return winners

    def _argmax_of_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same result from bf16 logits, of which those that rounding made equal are left."""
        logits = self.method.apply(hidden, None).view(len(hidden), -1, self.chunk)
        largest = logits.amax(-1).float()
        floor = largest.amax(-1, keepdim=True)
        floor -= 2 * _BF16_ROUNDING * floor.abs()
        rows, chunks = (largest >= floor).nonzero(as_tuple=True)
        kept, offsets = (logits[rows, chunks].float() >= floor[rows]).nonzero(as_tuple=True)
        rows, token_ids = rows[kept], chunks[kept] * self.chunk + offsets
        return self._decide(hidden.float(), rows, token_ids)

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
    return min(_LARGEST_CHUNK, vocab_size & -vocab_size)


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, for |x| below 2**22; torch.round would be split among threads.

    fp32 numbers of this size have no bits left behind the point.
    """
    whole = 1.5 * 2.0**23
    return (x + whole).sub_(whole)


def _margin(logits: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """How far a logit computed in int8 may be from the exact one."""
    return variance.sqrt().mul_(_DEVIATIONS).add_(logits.abs(), alpha=_BF16_ROUNDING)
