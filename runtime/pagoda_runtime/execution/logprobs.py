"""The likeliest tokens of a row, and the logprobs of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pagoda_runtime.ipc.messages import RowOutput, TokenLogprobs

_CHUNK = 64


def likeliest(values: torch.Tensor, num_wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values and their indices, best first, the lower index first of equals.

    Args:
        values: [length] fp32; -inf is never returned.
    Returns: values and int64 indices, each [num_wanted], or shorter where there are no more.
    """
    if num_wanted == 0:
        return values[:0], torch.empty(0, dtype=torch.int64, device=values.device)
    chunks = F.pad(values, (0, -len(values) % _CHUNK), value=-torch.inf).view(-1, _CHUNK)
    largest = chunks.amax(-1)
    if num_wanted < len(chunks):
        # As many chunks as tokens are wanted hold a value of at least `floor`, so no value below
        # it is wanted, and few others are that large. On a CPU several times faster than topk.
        floor = float(largest.topk(num_wanted, sorted=False).values.amin())
    elif num_wanted < len(values):
        floor = float(values.kthvalue(len(values) - num_wanted + 1).values)
    else:
        floor = -torch.inf
    floor = max(floor, torch.finfo(values.dtype).min)
    chunk_ids = (largest >= floor).nonzero().flatten()
    found = chunks[chunk_ids]
    places, offsets = (found >= floor).nonzero().unbind(-1)
    indices = chunk_ids[places] * _CHUNK + offsets
    ordered, order = found[places, offsets].sort(descending=True, stable=True)
    return ordered[:num_wanted], indices[order[:num_wanted]]


def compute_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """The logprobs of one token per row, and of the num_top likeliest ones.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
    """
    # Row by row: see sampler.sample.
    return [
        describe_tokens(row, [token_id], num_top)[0]
        for row, token_id in zip(logits, token_ids, strict=True)
    ]


def describe_tokens(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """The logprobs of several tokens at one place, and of the num_top likeliest ones.

    Args:
        logits: [vocab_size], any float dtype.
    """
    values = logits.float()
    logprobs = values.log_softmax(-1)
    # Ranked by their logits: logprobs of different tokens may be rounded to the same number.
    top_values, top_ids = likeliest(values, num_top)
    top = list(zip(top_ids.tolist(), logprobs[top_ids].tolist(), strict=True))
    return [
        TokenLogprobs(token_id, float(logprobs[token_id]), _rank(values, token_id, top_values), top)
        for token_id in token_ids
    ]


def _rank(values: torch.Tensor, token_id: int, top_values: torch.Tensor) -> int:
    """1 + how many values are larger than the token's."""
    value = values[token_id]
    num_larger = int((top_values > value).sum())
    if num_larger == len(top_values):
        num_larger = int((values > value).sum())
    return num_larger + 1


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int]) -> list[float]:
    """The logprob of each of several tokens at one place.

    Args:
        logits: [vocab_size], any float dtype.
    """
    ids = torch.tensor(token_ids, device=logits.device)
    return logits.log_softmax(-1, dtype=torch.float32)[ids].tolist()


def find_candidates(logits: torch.Tensor, num_candidates: int) -> RowOutput:
    """The likeliest tokens, best first, for a beam; fewer if fewer are possible at all.

    Args:
        logits: [vocab_size] fp32, -inf for tokens that must not come.
    """
    _, token_ids = likeliest(logits, num_candidates)
    return RowOutput(
        token_ids=token_ids.tolist(), token_logprobs=logits.log_softmax(-1)[token_ids].tolist()
    )
