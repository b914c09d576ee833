"""What a draw is, in plain torch: one after the other, sums in float64."""

from __future__ import annotations

from itertools import count, groupby
from operator import itemgetter

import torch

from pagoda_kernels.sampling.uniform import uniform

# In place of +inf, from which no weights follow.
LARGEST_LOGIT = 1e30


def draw_tokens_reference(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """See `pagoda_kernels.sampling.draw_tokens`."""
    rows, top_ks, states = draws[:3].tolist()
    limits = zip(rows, top_ks, *draws[3:].view(torch.float64).tolist(), strict=True)
    tokens: list[int] = []
    for (row, *some), alike in groupby(zip(limits, states, strict=True), itemgetter(0)):
        values = logits[row].float().nan_to_num(0.0, LARGEST_LOGIT, -torch.inf)
        tokens += _draw(values, [state for _, state in alike], *some)
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _draw(
    logits: torch.Tensor,
    states: list[int],
    top_k: int,
    temperature: float,
    min_p: float,
    top_p: float,
) -> list[int]:
    """A token for each state, which is that of a seed and a position."""
    token = int(logits.argmax())
    if temperature == 0.0:
        return [token] * len(states)
    # Not the difference of two infinities.
    differences = torch.where(logits == logits[token], 0.0, logits - logits[token])
    weights = (differences.double() / temperature).exp()
    weights[weights < min_p] = 0.0
    if 0 < top_k < len(logits):
        weights[logits.sort(descending=True, stable=True).indices[top_k:]] = 0.0
    return [_draw_one(logits, weights, top_p, state) for state in states]


def _draw_one(logits: torch.Tensor, weights: torch.Tensor, top_p: float, state: int) -> int:
    places = torch.arange(len(logits), device=logits.device)
    wanted = top_p * float(weights.sum())
    for attempt in count():
        cumulative = weights.cumsum(-1)
        target = uniform(state, attempt) * float(cumulative[-1])
        # Rounding may ask for more than there is; the last with any weight is meant.
        token = min(int((cumulative <= target).sum()), int(weights.nonzero()[-1]))
        if top_p >= 1.0:
            break
        # Those drawn from next are larger. If they miss top_p, the token is wanted.
        is_larger = (logits > logits[token]) | ((logits == logits[token]) & (places < token))
        weights = weights.where(is_larger, 0.0)
        mass = float(weights.sum())
        if mass < wanted or mass == 0.0:
            break
    return token
