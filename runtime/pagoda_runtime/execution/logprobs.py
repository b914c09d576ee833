"""The largest logits of rows, and the logprobs of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pagoda_kernels.transfer import OnTheWay, to_device
from pagoda_runtime.ipc.messages import RowOutput, ScheduledRow, TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams

Numbers = npt.NDArray[np.float64]

_CHUNK = 64


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row and their indices, best first, the lower of equals first.

    Args:
        values: [num_rows, length] fp32.
        k: at most length.
    Returns: values and int64 indices, each [num_rows, k].
    """
    if k == 0:
        return values[:, :0], torch.empty_like(values[:, :0], dtype=torch.int64)
    chunks = pad(values, _CHUNK, -torch.inf).view(len(values), -1, _CHUNK)
    num_chunks = chunks.shape[1]
    indices = torch.arange(num_chunks, device=values.device).expand(len(values), -1)
    if k < num_chunks:
        # The k chunks with the largest maxima hold the k largest values. On a CPU several times
        # faster than topk of all.
        indices = _find_largest(chunks.amax(-1), indices, k)
        chunks = chunks.gather(1, indices[:, :, None].expand(-1, -1, _CHUNK))
    within = torch.arange(_CHUNK, device=values.device)
    indices = (indices[:, :, None] * _CHUNK + within).flatten(1)
    indices = _find_largest(chunks.flatten(1), indices, k)
    return values.gather(1, indices), indices


def pad(values: torch.Tensor, multiple: int, value: float) -> torch.Tensor:
    """Rows as long as the next multiple; not copied if they are."""
    missing = -values.shape[1] % multiple
    return F.pad(values, (0, missing), value=value) if missing else values


def _find_largest(values: torch.Tensor, indices: torch.Tensor, k: int) -> torch.Tensor:
    """[num_rows, k] int64: the indices of the k largest, best first, the lower of equals first."""
    # topk leaves equals in any order, so make a whole number of value and index, in their order.
    bits = (values + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    order = bits.long().bitwise_left_shift_(32).sub_(indices).topk(k).indices
    return indices.gather(1, order)


def describe_tokens(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, *, is_argmax: bool = False
) -> tuple[torch.Tensor, ...]:
    """The logprob and rank of one token per row, and the num_top largest with theirs.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        token_ids: [num_rows] int64.
        is_argmax: the tokens were found to be the largest: by the order of logits before they were
            rounded, or as the first of equals.
    Returns: logprobs and ranks, [num_rows]; ids and logprobs, best first, [num_rows, num_top].
    """
    values, token_ids = logits.to(torch.float32, copy=is_argmax), token_ids[:, None]
    if is_argmax:
        # So they are here, too; what is added is less than what the rounding may have taken.
        largest = values.amax(-1, keepdim=True)
        values.scatter_(1, token_ids, largest.nextafter(torch.full_like(largest, torch.inf)))
    logprobs = values.log_softmax(-1)
    # Ranked by their logits: logprobs of different tokens may be rounded to the same number.
    _, top_ids = top_k(values, min(num_top, values.shape[1]))
    if is_argmax:
        ranks = torch.ones_like(logprobs[:, 0])
    else:
        # In fp32, exact up to 2**24 tokens: on a CPU, sums of bools are several times slower.
        is_larger = torch.gt(values, values.gather(1, token_ids), out=torch.empty_like(values))
        ranks = is_larger.sum(-1) + 1
    return logprobs.gather(1, token_ids)[:, 0], ranks, top_ids, logprobs.gather(1, top_ids)


def find_candidates(logits: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest tokens of each row, best first, and their logprobs, for beams.

    Args:
        logits: [num_rows, vocab_size] fp32, -inf for tokens that must not come.
    Returns: int64 ids and logprobs, [num_rows, num_candidates]; -inf where too few are possible.
    """
    _, token_ids = top_k(logits, min(num_candidates, logits.shape[1]))
    return token_ids, logits.log_softmax(-1).gather(1, token_ids)


def start_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int, *, in_batch: bool
) -> Callable[[], list[TokenLogprobs]]:
    """Begin to compute the logprobs of one token per row, and of the num_top largest ones.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        in_batch: all rows at once, as is best for a device that the host waits for; on a CPU the
            numbers of one row stay in its cache.
    """
    targets = to_device(np.array(token_ids, np.int64), logits.device)
    at_once = len(logits) if in_batch else 1
    parts = zip(logits.split(at_once), targets.split(at_once), strict=True)
    described = ToHost([describe_tokens(*part, num_top) for part in parts])

    def tell() -> list[TokenLogprobs]:
        columns = (np.concatenate(column) for column in zip(*described.wait(), strict=True))
        return tell_tokens(token_ids, *columns, num_top=num_top)

    return tell


def tell_tokens(token_ids: Sequence[int], *described: Numbers, num_top: int) -> list[TokenLogprobs]:
    """What `describe_tokens` found, read, for whom it may concern."""
    columns = (column.tolist() for column in described)
    return [
        TokenLogprobs(
            token_id,
            logprob,
            int(rank),
            [(int(i), p) for i, p in zip(ids[:num_top], some[:num_top], strict=True)],
        )
        for token_id, logprob, rank, ids, some in zip(token_ids, *columns, strict=True)
    ]


def tell_row(
    token_ids: list[int], described: Sequence[Numbers], params: SamplingParams
) -> RowOutput:
    """A row's tokens with the logprobs that its parameters ask for."""
    if not params.needs_logprobs:
        return RowOutput(token_ids=token_ids)
    logprobs = None
    if params.logprobs is not None:
        logprobs = tell_tokens(token_ids, *described, num_top=params.logprobs)
    return RowOutput(token_ids=token_ids, logprobs=logprobs, token_logprobs=described[0].tolist())


def tell_candidates(row: ScheduledRow, token_ids: Numbers, logprobs: Numbers) -> RowOutput:
    """A beam's candidates; fewer than it wants if fewer are possible at all."""
    most = min(row.num_candidates, int((logprobs > -math.inf).sum()))
    return RowOutput(
        token_ids=[int(i) for i in token_ids[:most]], token_logprobs=logprobs[:most].tolist()
    )


class ToHost:
    """The tensors on their way to the host, as float64, in one transfer that begins here."""

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        self._shapes = [[tensor.shape for tensor in group] for group in groups]
        tensors = [tensor.flatten().double() for group in groups for tensor in group]
        self._numbers = OnTheWay(torch.cat(tensors))

    def wait(self) -> list[list[Numbers]]:
        """The numbers of each tensor, once they are there."""
        numbers, start = self._numbers.wait().astype(np.float64, copy=False), 0
        found: list[list[Numbers]] = []
        for shapes in self._shapes:
            found.append([])
            for shape in shapes:
                size = shape.numel()
                found[-1].append(numbers[start : start + size].reshape(shape))
                start += size
        return found
