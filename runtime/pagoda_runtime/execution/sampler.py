"""Choose the tokens of each row from its logits.

A draw depends on the row's logits, parameters, history, seed and position alone, so a request gets
the same tokens whatever else is in the batch, and again after a preemption.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pagoda_runtime.execution.logits import is_processed, process_logits
from pagoda_runtime.execution.logprobs import (
    describe_tokens,
    find_candidates,
    likeliest,
    token_logprobs,
)
from pagoda_runtime.ipc.messages import RowOutput, ScheduledRow
from pagoda_runtime.sampling_params import SamplingParams

_CHUNK = 512
_MASK64 = (1 << 64) - 1


def sample(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int] = ()
) -> list[RowOutput]:
    """One output per row: one token for each of its seeds, or a beam's candidates.

    Order: `logits.process_logits`, temperature, min_p, top-k, top-p, draw. Greedy rows take the
    largest processed logit, the first of equals. Logprobs are of the logits before all that.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        rows: with sampling_params.
        eos_token_ids: the model's end tokens.
    """
    params = [_params_of(row) for row in rows]
    plain = [
        index
        for index, row in enumerate(rows)
        if params[index].is_greedy and not row.num_candidates and not is_processed(row)
    ]
    best = []
    if plain:
        best = _argmax(logits if len(plain) == len(rows) else logits[plain])
    greedy = dict(zip(plain, best, strict=True))
    outputs = []
    # Row by row: a vocabulary of fp32 in the processor's cache beats a batch in memory, and no
    # row's rounding depends on its neighbours.
    for index, row in enumerate(rows):
        if index in greedy:
            token_ids = [greedy[index]] * len(row.seeds)
        else:
            processed = process_logits(logits[index], row, eos_token_ids)
            if row.num_candidates:
                outputs.append(find_candidates(processed, row.num_candidates))
                continue
            token_ids = _choose(processed, row, params[index])
        outputs.append(_describe(logits[index], token_ids, params[index]))
    return outputs


def wants_likeliest(row: ScheduledRow) -> bool:
    """Whether a row's output is the token of its largest logit as computed, and nothing else."""
    params = _params_of(row)
    return (
        params.is_greedy
        and not row.num_candidates
        and not is_processed(row)
        and params.logprobs is None
        and not params.needs_logprobs
    )


def _params_of(row: ScheduledRow) -> SamplingParams:
    assert row.sampling_params is not None
    return row.sampling_params


def _describe(logits: torch.Tensor, token_ids: list[int], params: SamplingParams) -> RowOutput:
    """The tokens with the logprobs that the parameters ask for."""
    if params.logprobs is not None:
        logprobs = describe_tokens(logits, token_ids, params.logprobs)
        return RowOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            token_logprobs=[token.logprob for token in logprobs],
        )
    if params.needs_logprobs:
        return RowOutput(token_ids=token_ids, token_logprobs=token_logprobs(logits, token_ids))
    return RowOutput(token_ids=token_ids)


def uniform(seed: int, position: int, attempt: int = 0) -> float:
    """A number from 0 to below 1, made from the arguments alone.

    Source: SplitMix64 of Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    2014.
    """
    state = seed & _MASK64
    for step in (position, attempt):
        state = (_mix(state) + (step + 1) * 0x9E3779B97F4A7C15) & _MASK64
    return (_mix(state) >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _argmax(logits: torch.Tensor) -> list[int]:
    """The index of each row's largest logit, the first of equals."""
    num_rows, vocab_size = logits.shape
    if vocab_size % _CHUNK:
        return [int(token_id) for token_id in logits.float().argmax(dim=-1).tolist()]
    # amax is vectorized on a CPU and argmax is not: find the chunk, then look into it alone.
    chunks = logits.view(num_rows, -1, _CHUNK)
    best = chunks.amax(dim=-1).float().argmax(dim=-1)
    best_chunks = chunks[torch.arange(num_rows, device=logits.device), best]
    token_ids = best * _CHUNK + best_chunks.float().argmax(dim=-1)
    return [int(token_id) for token_id in token_ids.tolist()]


def _choose(logits: torch.Tensor, row: ScheduledRow, params: SamplingParams) -> list[int]:
    """One token for each of the row's seeds.

    Args:
        logits: [vocab_size] fp32, processed.
    """
    if params.is_greedy:
        return _argmax(logits[None]) * len(row.seeds)
    scaled, token_ids = logits / params.temperature, None
    if 0 < params.top_k < len(logits):
        scaled, token_ids = likeliest(scaled, params.top_k)
    weights = scaled.softmax(-1)
    # min_p and top-k each leave the likeliest tokens, so either may come first.
    if params.min_p > 0.0:
        weights = F.threshold(weights, _just_below(params.min_p * float(weights.amax())), 0.0)
    if len(weights) > _CHUNK:
        weights = F.pad(weights, (0, -len(weights) % _CHUNK))
    position = row.start + len(row.token_ids)
    drawn = [_draw(weights, params.top_p, seed, position) for seed in row.seeds]
    return drawn if token_ids is None else token_ids[drawn].tolist()


def _draw(weights: torch.Tensor, top_p: float, seed: int, position: int) -> int:
    """An index in proportion to the weights of the likeliest tokens that reach top_p together.

    Of equal weights the lower index is likelier. Instead of sorting, draws from all tokens, and if
    those likelier than the drawn one reach top_p without it, again from these: among the tokens
    that may be drawn the proportions are the same in every attempt.
    Source: Ye et al., FlashInfer, MLSys 2025 (sorting-free sampling).
    """
    sums = _chunk_sums(weights)
    wanted = top_p * float(sums.sum())
    for attempt in itertools.count():
        index = _invert(weights, sums, uniform(seed, position, attempt))
        if top_p >= 1.0:
            break
        weights = _likelier(weights, index)
        sums = _chunk_sums(weights)
        mass = float(sums.sum())
        # None is likelier than the likeliest, even if so small a top_p is rounded to 0.
        if mass < wanted or mass == 0.0:
            break
    return index


def _likelier(weights: torch.Tensor, index: int) -> torch.Tensor:
    """The weights, with 0 in place of the one at index and of all that are not likelier."""
    weight = float(weights[index])
    return torch.cat(
        [
            F.threshold(weights[:index], _just_below(weight), 0.0),
            F.threshold(weights[index:], weight, 0.0),
        ]
    )


def _just_below(weight: float) -> float:
    """The fp32 number before this one: what is above it is at least the weight."""
    return float(np.nextafter(np.float32(weight), np.float32(-math.inf)))


def _chunk_sums(weights: torch.Tensor) -> torch.Tensor:
    """[num_chunks] float64: sums of weights, or the weights themselves if they are few."""
    if len(weights) <= _CHUNK:
        return weights.double()
    return weights.view(-1, _CHUNK).sum(-1).double()


def _invert(weights: torch.Tensor, sums: torch.Tensor, target: float) -> int:
    """The first index whose cumulative weight exceeds target × the total."""
    # A running sum is not vectorized: take it of the sums of chunks, then of one chunk.
    chunk, rest = _invert_directly(sums, target * float(sums.sum()))
    if len(sums) == len(weights):
        return chunk
    weights = weights[chunk * _CHUNK : (chunk + 1) * _CHUNK].double()
    return chunk * _CHUNK + _invert_directly(weights, rest)[0]


def _invert_directly(weights: torch.Tensor, wanted: float) -> tuple[int, float]:
    """The first index whose cumulative weight exceeds `wanted`, and what was wanted of it."""
    cumulative = weights.cumsum(-1)
    index = int(torch.searchsorted(cumulative, wanted, right=True))
    # Rounding may leave the last sum below what is wanted; the last with any weight is meant.
    index = min(index, int(weights.nonzero()[-1]))
    return index, max(0.0, wanted - float(cumulative[index] - weights[index]))
