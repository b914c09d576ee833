"""Draw tokens in proportion to their weights: one draw after the other, or many at once.

The two choose the same tokens. What is fast in one is slow in the other: a CPU looks at a result
and cuts short what is left to do, and a device that the host waits for does all without a look.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pagoda_runtime.execution.logprobs import pad

_CHUNK = 512
_MASK64 = (1 << 64) - 1
# Attempts of a draw in a batch: more are needed for 1 in a million at a top_p of 0.5.
_NUM_ATTEMPTS = 8
_Ints = TypeVar("_Ints", int, npt.NDArray[np.integer])


class Draw(NamedTuple):
    """One draw from a row of weights."""

    row: int
    top_p: float
    seed: int
    position: int


def uniform(seed: int, position: int, attempt: int = 0) -> float:
    """A number from 0 to below 1, made from the arguments alone."""
    return (_mixed(seed & _MASK64, position, attempt) >> 11) / (1 << 53)


def _mixed(seeds: _Ints, positions: _Ints, attempts: _Ints) -> _Ints:
    """64 bits for each.

    Source: SplitMix64 of Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    2014.
    """
    state = seeds
    for step in (positions, attempts):
        state = (_mix(state) + (step + 1) * 0x9E3779B97F4A7C15) & _MASK64
    return _mix(state)


def _mix(value: _Ints) -> _Ints:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def draw_each(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """[num_draws] int64: for each draw an index in proportion to the weights of the largest of its
    row that reach top_p together. Of equal weights the lower index counts as larger.

    Instead of sorting, draws from all, and if those larger than the drawn one reach top_p without
    it, again from these: among those that may be drawn the proportions are the same in every
    attempt.
    Source: Ye et al., FlashInfer, MLSys 2025 (sorting-free sampling).

    Args:
        weights: [num_rows, length] fp32, from 0 on.
    """
    if weights.shape[1] > _CHUNK:
        weights = pad(weights, _CHUNK, 0.0)
    return torch.tensor([_draw(weights[some.row], some) for some in draws])


def draw_together(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """What `draw_each` returns, with nothing read by the host; -1 if _NUM_ATTEMPTS are too few."""
    device, top_p = weights.device, [some.top_p for some in draws]
    if len(draws) > len(weights):
        weights = weights[torch.tensor([some.row for some in draws], device=device)]
    num_attempts = _NUM_ATTEMPTS if min(top_p) < 1.0 else 1
    seeds = np.array([some.seed & _MASK64 for some in draws], np.uint64)[:, None]
    positions = np.array([some.position for some in draws], np.uint64)[:, None]
    attempts = np.arange(num_attempts, dtype=np.uint64)[None]
    numbers = (_mixed(seeds, positions, attempts) >> 11) / (1 << 53)
    columns = torch.from_numpy(np.column_stack([top_p, numbers])).to(device)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted, is_done = columns[:, 0] * cumulative[:, -1], columns[:, 0] >= 1.0
    indices = _invert_together(cumulative, columns[:, 1])
    for attempt in range(2, num_attempts + 1):
        chosen, places = weights.gather(1, indices), torch.arange(weights.shape[1], device=device)
        is_larger = (weights > chosen) | ((weights == chosen) & (places < indices))
        weights = weights.where(is_larger, 0.0)
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        mass = cumulative[:, -1]
        is_done = is_done | (mass < wanted) | (mass == 0.0)
        drawn = _invert_together(cumulative, columns[:, attempt])
        indices = indices.where(is_done[:, None], drawn)
    return indices[:, 0].where(is_done, -1)


def _invert_together(cumulative: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[num_draws, 1] int64: the first place that exceeds target × the last one's number."""
    total = cumulative[:, -1]
    # Rounding must not ask for more than there is.
    wanted = torch.minimum(targets * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, wanted[:, None], right=True)
    return found.clamp_max(cumulative.shape[1] - 1)


def _draw(weights: torch.Tensor, draw: Draw) -> int:
    sums = _chunk_sums(weights)
    wanted = draw.top_p * float(sums.sum())
    for attempt in itertools.count():
        index = _invert(weights, sums, uniform(draw.seed, draw.position, attempt))
        if draw.top_p >= 1.0:
            break
        weights = _larger(weights, index)
        sums = _chunk_sums(weights)
        mass = float(sums.sum())
        # Nothing is larger than the largest, even if so small a top_p is rounded to 0.
        if mass < wanted or mass == 0.0:
            break
    return index


def _larger(weights: torch.Tensor, index: int) -> torch.Tensor:
    """The weights, with 0 in place of the one at index and of all that are not larger."""
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
