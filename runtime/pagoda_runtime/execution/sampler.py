"""Choose the tokens of each row from its logits, on a CPU: as many rows of a kind at once as its
cache holds. `batch_sampler` chooses the same tokens on a device.

A draw depends on the row's logits, parameters, history, seed and position alone, so a request gets
the same tokens whatever else is in the batch, and again after a preemption.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from pagoda_kernels.sampling import Draw, make_state
from pagoda_runtime.execution.draw import draw_each
from pagoda_runtime.execution.logits import (
    Few,
    clean_logits,
    find_few,
    is_plain,
    params_of,
    process_logits,
)
from pagoda_runtime.execution.logprobs import (
    Numbers,
    ToHost,
    describe_tokens,
    find_candidates,
    tell_candidates,
    tell_row,
    top_k,
)
from pagoda_runtime.ipc.messages import RowOutput, ScheduledRow
from pagoda_runtime.models.model import Model

_CHUNK = 512
# Numbers of fp32 that stay in a CPU's cache.
_CACHED = 1 << 18
# Top-k keeps a multiple of this, so that no sum depends on the rows beside.
_TOP_K_STEP = 64


def sample_hidden(
    model: Model, hidden: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> list[RowOutput]:
    """What `sample` returns for the logits of each row of hidden.

    A model that finds the largest logit without the others, and more exactly, is asked for it
    whether logprobs are wanted or not, and whatever the other rows want: a request's tokens must
    depend on neither.
    """
    plain = [index for index, row in enumerate(rows) if is_plain(row)]
    tokens = model.argmax(_take(hidden, plain)) if plain else None
    if tokens is None:
        return sample(model.logits(hidden), rows, eos_token_ids)
    argmax = dict(zip(plain, tokens.tolist(), strict=True))
    found = {i: RowOutput(token_ids=[argmax[i]] * len(rows[i].seeds)) for i in plain}
    others = [i for i, row in enumerate(rows) if i not in argmax or params_of(row).needs_logprobs]
    if others:
        logits, some = model.logits(_take(hidden, others)), [rows[index] for index in others]
        known = [argmax.get(index, -1) for index in others]
        found |= zip(others, sample(logits, some, eos_token_ids, known), strict=True)
    return [found[index] for index in range(len(rows))]


def sample(
    logits: torch.Tensor,
    rows: Sequence[ScheduledRow],
    eos_token_ids: Collection[int] = (),
    argmax: Sequence[int] = (),
) -> list[RowOutput]:
    """One output per row: one token for each of its seeds, or a beam's candidates.

    Order: `logits.process_logits`, temperature, min_p, top-k, top-p, draw. Greedy rows take the
    largest processed logit, the first of equals. Logprobs are of the logits before all that.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        rows: with sampling_params.
        eos_token_ids: the model's end tokens.
        argmax: where they are known the tokens of the largest logits, if there are rows that take
            these as computed.
    """
    groups = _make_groups(logits, rows, eos_token_ids)
    outputs: dict[int, RowOutput] = {}
    chosen = [group.choose(eos_token_ids, argmax) for group in groups]
    for group, found in zip(groups, ToHost(chosen).wait(), strict=True):
        outputs |= zip(group.indices, group.tell(found), strict=True)
    return [outputs[index] for index in range(len(rows))]


def _make_groups(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], eos_token_ids: Collection[int]
) -> list[_Group]:
    """Each row in one group, with others that are sampled like it."""
    groups = []
    members: dict[tuple[bool, ...], list[int]] = {}
    for index, row in enumerate(rows):
        few = find_few(row, eos_token_ids, logits.shape[1])
        if few is not None:
            groups.append(_Group([index], [row], logits[index, None], few))
            continue
        params = params_of(row)
        kind = (
            is_plain(row),
            params.needs_logprobs,
            params.is_greedy,
            0 < params.top_k < logits.shape[1],
            row.num_candidates > 0,
        )
        members.setdefault(kind, []).append(index)
    for (takes_argmax, needs_logprobs, *_), indices in members.items():
        # An argmax leaves nothing that should stay in the cache.
        is_whole = takes_argmax and not needs_logprobs
        most = len(rows) if is_whole else max(1, _CACHED // logits.shape[1])
        for at in range(0, len(indices), most):
            some = indices[at : at + most]
            groups.append(_Group(some, [rows[index] for index in some], _take(logits, some)))
    return groups


def _take(tensor: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """The rows at the indices; not copied if they are all or one."""
    if len(indices) == 1:
        return tensor[indices[0], None]
    return tensor if indices == list(range(len(tensor))) else tensor[indices]


class _Group(NamedTuple):
    """Rows that are sampled together, because all or none are beams, greedy, have a top_k, …"""

    indices: list[int]
    rows: list[ScheduledRow]
    logits: torch.Tensor
    """[num_rows, vocab_size]"""
    few: Few | None = None
    """What the mask of a single row comes to."""

    def choose(self, eos_token_ids: Collection[int], argmax: Sequence[int]) -> list[torch.Tensor]:
        """A token for each seed of each row, and if logprobs are wanted what `describe_tokens`
        returns of them; for beams what `find_candidates` returns.
        """
        takes_argmax, params = is_plain(self.rows[0]), [params_of(row) for row in self.rows]
        logits = self.logits
        few = self.few
        if few is not None and few.are_allowed:
            logits = clean_logits(logits[:, few.token_ids])
        elif few is not None:
            logits = clean_logits(logits).index_fill_(1, few.token_ids, -torch.inf)
        elif not takes_argmax:
            logits = process_logits(logits, self.rows, eos_token_ids)
        if self.rows[0].num_candidates:
            return [*find_candidates(logits, max(row.num_candidates for row in self.rows))]
        of_seeds = [at for at, row in enumerate(self.rows) for _ in row.seeds]
        if takes_argmax and argmax:
            chosen = torch.tensor([argmax[index] for index in self.indices], device=logits.device)
            token_ids = _take(chosen, of_seeds)
        elif params[0].is_greedy:
            token_ids = _take(_argmax(logits), of_seeds)
        else:
            token_ids = _draw(logits, self.rows)
        if few is not None and few.are_allowed:
            token_ids = few.token_ids[token_ids]
        if not params[0].needs_logprobs:
            return [token_ids]
        num_top = max(some.logprobs or 0 for some in params)
        described = describe_tokens(
            _take(self.logits, of_seeds), token_ids, num_top, is_argmax=takes_argmax
        )
        return [token_ids, *described]

    def tell(self, found: list[Numbers]) -> list[RowOutput]:
        """The outputs of the rows, from what `choose` returned, on the host."""
        if self.rows[0].num_candidates:
            return [tell_candidates(row, *top) for row, *top in zip(self.rows, *found, strict=True)]
        outputs, first = [], 0
        for row in self.rows:
            token_ids, *described = (column[first : first + len(row.seeds)] for column in found)
            outputs.append(tell_row([int(i) for i in token_ids], described, params_of(row)))
            first += len(row.seeds)
        return outputs


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] int64: the index of each row's largest logit, the first of equals."""
    num_rows, vocab_size = logits.shape
    if vocab_size % _CHUNK:
        return logits.float().argmax(dim=-1)
    # amax is vectorized on a CPU and argmax is not: find the chunk, then look into it alone.
    chunks = logits.view(num_rows, -1, _CHUNK)
    best = chunks.amax(dim=-1).float().argmax(dim=-1)
    best_chunks = chunks[torch.arange(num_rows, device=logits.device), best]
    return best * _CHUNK + best_chunks.float().argmax(dim=-1)


def _draw(logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> torch.Tensor:
    """[num_draws] int64: a token for each seed of each row.

    Args:
        logits: [num_rows, vocab_size] fp32, processed; overwritten.
    """
    params = [params_of(row) for row in rows]
    numbers = [(some.temperature, some.top_k, some.min_p) for some in params]
    columns = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    temperature, most, min_p = columns.T[:, :, None]
    token_ids = None
    if 0 < params[0].top_k < logits.shape[1]:
        k = max(some.top_k for some in params)
        logits, token_ids = top_k(logits, min(k + -k % _TOP_K_STEP, logits.shape[1]))
        places = torch.arange(logits.shape[1], device=logits.device)
        logits.masked_fill_(places >= most, -torch.inf)
        # Drawn from in the order of tokens, as of all.
        token_ids, order = token_ids.sort(-1)
        logits = logits.gather(-1, order)
    weights = logits.div_(temperature.float()).softmax(-1)
    # min_p and top-k each leave the largest, so either may come first.
    if any(some.min_p > 0.0 for some in params):
        least = (min_p * weights.amax(-1, keepdim=True)).float()
        # In fp32, because on a CPU comparisons that result in bools are several times slower.
        weights.mul_(torch.ge(weights, least, out=torch.empty_like(weights)))
    draws = [
        Draw(at, state=make_state(seed, row.start + len(row.token_ids)), top_p=params[at].top_p)
        for at, row in enumerate(rows)
        for seed in row.seeds
    ]
    drawn = draw_each(weights, draws)
    if token_ids is None:
        return drawn
    of_draws = torch.tensor([draw.row for draw in draws], device=logits.device)
    return token_ids[of_draws, drawn]
