"""Draw tokens in proportion to their weights, as is fast on a CPU: with a look at each result,
which cuts short what is left to do. `pagoda_kernels.sampling` draws the same tokens on a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pagoda_kernels.sampling import Draw, uniform
from pagoda_runtime.execution.logprobs import pad

_CHUNK = 512


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


def _draw(weights: torch.Tensor, draw: Draw) -> int:
    sums = _chunk_sums(weights)
    wanted = draw.top_p * float(sums.sum())
    for attempt in itertools.count():
        index = _invert(weights, sums, uniform(draw.state, attempt))
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
    # What is above the fp32 number before this one is at least the weight.
    below = float(np.nextafter(np.float32(weight), np.float32(-math.inf)))
    before, after = weights[:index], weights[index:]
    return torch.cat([F.threshold(before, below, 0.0), F.threshold(after, weight, 0.0)])


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
