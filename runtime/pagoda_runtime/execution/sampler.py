"""Choose one token per row from its logits.

A draw depends on the row's logits, parameters, seed and position alone, so a request gets the same
tokens whatever else is in the batch, and again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda_runtime.engine.messages import RowOutput, ScheduledRow, TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams

# Candidates looked at first when only top_p limits them. A row of so much entropy that they do not
# reach top_p is cut by a threshold instead; sorting a whole vocabulary would cost many times more.
_FIRST_CANDIDATES = 1024
_CHUNK = 512
_MASK64 = (1 << 64) - 1


def sample(logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> list[RowOutput]:
    """One output per row, with one token for each of its seeds.

    Order: temperature, top-k, top-p, draw. Greedy rows take the largest logit, the first of equals.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        rows: with sampling_params.
    """
    params = [_params_of(row) for row in rows]
    greedy_rows = [index for index, p in enumerate(params) if p.is_greedy]
    best = []
    if greedy_rows:
        best = _argmax(logits if len(greedy_rows) == len(rows) else logits[greedy_rows])
    greedy = dict(zip(greedy_rows, best, strict=True))
    outputs = []
    # Row by row: a vocabulary of fp32 in the processor's cache beats a batch in memory, and no
    # row's rounding depends on its neighbours.
    for index, row in enumerate(rows):
        if index in greedy:
            token_ids = [greedy[index]] * len(row.seeds)
        else:
            position = row.start + len(row.token_ids)
            token_ids = [_draw(logits[index], params[index], s, position) for s in row.seeds]
        outputs.append(RowOutput(token_ids=token_ids))
    return outputs


def _params_of(row: ScheduledRow) -> SamplingParams:
    assert row.sampling_params is not None
    return row.sampling_params


def compute_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """The logprobs of one token per row, and of the num_top likeliest ones.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, tops = logprobs.topk(num_top, dim=-1)
    rows = zip(
        token_ids,
        chosen.flatten().tolist(),
        ranks.tolist(),
        tops.tolist(),
        values.tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(ids, top, strict=True)))
        for token_id, logprob, rank, ids, top in rows
    ]


def uniform(seed: int, position: int) -> float:
    """A number from 0 to below 1, made from (seed, position) alone.

    Source: SplitMix64 of Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    2014.
    """
    state = (_mix(seed & _MASK64) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
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


def _draw(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Invert the cumulative distribution at the uniform number of (seed, position)."""
    scaled = logits.float() / params.temperature
    target = uniform(seed, position)
    if params.top_k <= 0 and params.top_p >= 1.0:
        return _invert(scaled.softmax(-1), target)
    probabilities, token_ids = _candidates(scaled, params)
    return int(token_ids[_invert(probabilities, target)])


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, largest first, and ids of the tokens that top-k and top-p leave."""
    vocab_size = len(scaled)
    if params.top_k > 0:
        values, token_ids = scaled.topk(min(params.top_k, vocab_size))
        probabilities = values.softmax(-1)
    else:
        values, token_ids = scaled.topk(min(_FIRST_CANDIDATES, vocab_size))
        probabilities = (values - scaled.logsumexp(-1)).exp_()
        if float(probabilities.sum()) < params.top_p:
            return _cut_by_threshold(scaled.softmax(-1), params.top_p)
    before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
    # The token that crosses top_p stays, so at least one always does.
    kept = max(1, int((before < params.top_p).sum()))
    return probabilities[:kept], token_ids[:kept]


def _cut_by_threshold(
    probabilities: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens that reach top_p together, in the vocabulary's order.

    Finds the least probability that is kept as quickselect finds a rank: halves that are known to
    be kept or dropped are not looked at again. Tokens of equal probability stay together.
    """
    undecided, kept_mass = probabilities, 0.0
    while len(undecided) > _FIRST_CANDIDATES:
        is_upper = undecided > undecided.mean()
        upper = undecided[is_upper]
        # Equal values; their mean may be rounded to either side of them.
        if len(upper) in (0, len(undecided)):
            break
        upper_mass = float(upper.sum(dtype=torch.float64))
        if kept_mass + upper_mass >= top_p:
            undecided = upper
        else:
            kept_mass += upper_mass
            undecided = undecided[~is_upper]
    undecided = undecided.sort(descending=True).values
    is_reached = undecided.cumsum(-1, dtype=torch.float64) + kept_mass >= top_p
    # If rounding leaves the sum of all below top_p, all are kept.
    last = int(is_reached.int().argmax()) if bool(is_reached.any()) else -1
    token_ids = (probabilities >= undecided[last]).nonzero().flatten()
    return probabilities[token_ids], token_ids


def _invert(weights: torch.Tensor, target: float) -> int:
    """The first index whose cumulative weight exceeds target × the total."""
    num_chunks, rest = divmod(len(weights), _CHUNK)
    if num_chunks > 1 and not rest:
        # A running sum is not vectorized: take it of the sums of chunks, then of one chunk.
        chunks = weights.view(-1, _CHUNK)
        sums = chunks.sum(-1, dtype=torch.float64)
        chunk = _invert_directly(sums, target)
        before = float(sums[:chunk].sum())
        within = (target * float(sums.sum()) - before) / float(sums[chunk])
        return chunk * _CHUNK + _invert_directly(chunks[chunk], min(max(within, 0.0), 1.0))
    return _invert_directly(weights, target)


def _invert_directly(weights: torch.Tensor, target: float) -> int:
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted = target * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, wanted, right=True))
    # Rounding may leave the last sum below the target; the last token with any weight is meant.
    return min(index, int(weights.nonzero()[-1]))
