"""Choose the tokens of each row from its logits.

A draw depends on the row's logits, parameters, history, seed and position alone, so a request gets
the same tokens whatever else is in the batch, and again after a preemption.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from pagoda_runtime.execution.draw import Draw, draw_each, draw_together
from pagoda_runtime.execution.logits import is_processed, params_of, process_logits
from pagoda_runtime.execution.logprobs import (
    Numbers,
    ToHost,
    describe_tokens,
    find_candidates,
    tell_tokens,
    top_k,
)
from pagoda_runtime.ipc.messages import RowOutput, ScheduledRow
from pagoda_runtime.models.model import Model
from pagoda_runtime.sampling_params import SamplingParams

_CHUNK = 512
# Numbers of fp32 that stay in a CPU's cache.
_CACHED = 1 << 18
# Top-k keeps a multiple of this, so that no sum depends on the rows beside.
_TOP_K_STEP = 64


class Sampled(Protocol):
    """The tokens of rows, which a device may still be computing."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int64, where the logits are: each row's first token; for a beam any token."""

    def tell(self) -> list[RowOutput]:
        """Wait for the tokens and the rest; what `sample` returns."""


def start_sampling(
    model: Model,
    hidden: torch.Tensor,
    rows: Sequence[ScheduledRow],
    eos_token_ids: Collection[int],
    *,
    in_batch: bool,
) -> Sampled:
    """Choose the tokens of each row of hidden, in a batch without waiting for them: see `sample`.

    A model that finds the largest logit without the others, and more exactly, is asked for it
    whether logprobs are wanted or not, and whatever the other rows want: a request's tokens must
    depend on neither.
    """
    plain = [index for index, row in enumerate(rows) if _is_plain(row)]
    tokens = model.argmax(_take(hidden, plain)) if plain else None
    if tokens is None:
        return start_with_logits(model.logits(hidden), rows, eos_token_ids, in_batch=in_batch)
    argmax = dict(zip(plain, tokens.tolist(), strict=True))
    outputs = {i: RowOutput(token_ids=[argmax[i]] * len(rows[i].seeds)) for i in plain}
    others = [i for i, row in enumerate(rows) if i not in argmax or params_of(row).needs_logprobs]
    if others:
        found = sample(
            model.logits(_take(hidden, others)),
            [rows[index] for index in others],
            eos_token_ids,
            in_batch=in_batch,
            argmax=[argmax.get(index, -1) for index in others],
        )
        outputs |= zip(others, found, strict=True)
    return _Told([outputs[index] for index in range(len(rows))], hidden.device)


def sample_hidden(
    model: Model,
    hidden: torch.Tensor,
    rows: Sequence[ScheduledRow],
    eos_token_ids: Collection[int],
    *,
    in_batch: bool,
) -> list[RowOutput]:
    """What `start_sampling` tells."""
    return start_sampling(model, hidden, rows, eos_token_ids, in_batch=in_batch).tell()


def sample(
    logits: torch.Tensor,
    rows: Sequence[ScheduledRow],
    eos_token_ids: Collection[int] = (),
    *,
    in_batch: bool,
    argmax: Sequence[int] = (),
) -> list[RowOutput]:
    """One output per row: one token for each of its seeds, or a beam's candidates.

    Order: `logits.process_logits`, temperature, min_p, top-k, top-p, draw. Greedy rows take the
    largest processed logit, the first of equals. Logprobs are of the logits before all that.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        rows: with sampling_params.
        eos_token_ids: the model's end tokens.
        in_batch: compute all rows of a kind together and read all results at once, as is best for
            a device that the host waits for; by default as many as a CPU's cache holds. The tokens
            are the same.
        argmax: where they are known the tokens of the largest logits, if there are rows that take
            these as computed.
    """
    return start_with_logits(logits, rows, eos_token_ids, in_batch=in_batch, argmax=argmax).tell()


def start_with_logits(
    logits: torch.Tensor,
    rows: Sequence[ScheduledRow],
    eos_token_ids: Collection[int],
    *,
    in_batch: bool,
    argmax: Sequence[int] = (),
) -> Sampled:
    """Choose the tokens of each row of logits, in a batch without waiting for them: see `sample`.

    What comes to the host is on its way from here on, whatever is begun before it is asked for.
    """
    groups = _make_groups(logits, rows, in_batch)
    chosen = [group.choose(eos_token_ids, in_batch, argmax) for group in groups]
    return _Chosen(groups, chosen, ToHost(chosen), eos_token_ids)


class _Told(NamedTuple):
    """Tokens that the host knows."""

    outputs: list[RowOutput]
    device: torch.device

    @property
    def token_ids(self) -> torch.Tensor:
        return torch.tensor([output.token_ids[0] for output in self.outputs], device=self.device)

    def tell(self) -> list[RowOutput]:
        return self.outputs


class _Chosen(NamedTuple):
    """What each group chose."""

    groups: list[_Group]
    chosen: list[list[torch.Tensor]]
    on_host: ToHost
    eos_token_ids: Collection[int]

    @property
    def token_ids(self) -> torch.Tensor:
        indices = [index for group in self.groups for index in group.indices]
        firsts = [
            group.first_tokens(some) for group, some in zip(self.groups, self.chosen, strict=True)
        ]
        token_ids = torch.cat(firsts)
        return torch.empty_like(token_ids).index_copy_(
            0, torch.tensor(indices, device=token_ids.device), token_ids
        )

    def tell(self) -> list[RowOutput]:
        outputs: dict[int, RowOutput] = {}
        for group, found in zip(self.groups, self.on_host.wait(), strict=True):
            if (found[0] < 0).any():
                # Some draw needs more attempts.
                told = sample(group.logits, group.rows, self.eos_token_ids, in_batch=False)
            else:
                told = group.tell(found)
            outputs |= zip(group.indices, told, strict=True)
        return [outputs[index] for index in range(len(outputs))]


def _make_groups(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], in_batch: bool
) -> list[_Group]:
    """Each row in one group, with others that are sampled like it."""
    members: dict[tuple[bool, ...], list[int]] = {}
    for index, row in enumerate(rows):
        params = params_of(row)
        kind = (
            _is_plain(row),
            params.needs_logprobs,
            params.is_greedy,
            0 < params.top_k < logits.shape[1],
            row.num_candidates > 0,
        )
        members.setdefault(kind, []).append(index)
    groups = []
    for (is_plain, needs_logprobs, *_), indices in members.items():
        # An argmax leaves nothing that should stay in the cache.
        is_whole = in_batch or (is_plain and not needs_logprobs)
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


def _is_plain(row: ScheduledRow) -> bool:
    """Whether the row takes the token of the largest logit as computed."""
    return params_of(row).is_greedy and not row.num_candidates and not is_processed(row)


class _Group(NamedTuple):
    """Rows that are sampled together, because all or none are beams, greedy, have a top_k, …"""

    indices: list[int]
    rows: list[ScheduledRow]
    logits: torch.Tensor
    """[num_rows, vocab_size]"""

    def choose(
        self, eos_token_ids: Collection[int], in_batch: bool, argmax: Sequence[int]
    ) -> list[torch.Tensor]:
        """A token for each seed of each row, -1 if it is not found in a batch, and if logprobs are
        wanted what `describe_tokens` returns of them; for beams what `find_candidates` returns.
        """
        is_plain, params = _is_plain(self.rows[0]), [params_of(row) for row in self.rows]
        logits = self.logits
        if not is_plain:
            logits = process_logits(logits, self.rows, eos_token_ids)
        if self.rows[0].num_candidates:
            return [*find_candidates(logits, max(row.num_candidates for row in self.rows))]
        of_seeds = [at for at, row in enumerate(self.rows) for _ in row.seeds]
        if is_plain and argmax:
            chosen = torch.tensor([argmax[index] for index in self.indices], device=logits.device)
            token_ids = _take(chosen, of_seeds)
        elif params[0].is_greedy:
            token_ids = _take(_argmax(logits), of_seeds)
        else:
            token_ids = _draw(logits, self.rows, in_batch)
        if not params[0].needs_logprobs:
            return [token_ids]
        num_top = max(some.logprobs or 0 for some in params)
        described = describe_tokens(
            _take(self.logits, of_seeds), token_ids.clamp_min(0), num_top, is_argmax=is_plain
        )
        return [token_ids, *described]

    def first_tokens(self, chosen: list[torch.Tensor]) -> torch.Tensor:
        """[num_rows] int64: of what `choose` returned, each row's first token."""
        if self.rows[0].num_candidates:
            return chosen[0][:, 0]
        ends = accumulate(len(row.seeds) for row in self.rows)
        return _take(
            chosen[0], [end - len(row.seeds) for end, row in zip(ends, self.rows, strict=True)]
        )

    def tell(self, found: list[Numbers]) -> list[RowOutput]:
        """The outputs of the rows, from what `choose` returned, on the host."""
        if self.rows[0].num_candidates:
            return [_candidates(row, *top) for row, *top in zip(self.rows, *found, strict=True)]
        outputs, first = [], 0
        for row in self.rows:
            token_ids, *described = (column[first : first + len(row.seeds)] for column in found)
            outputs.append(_tell([int(i) for i in token_ids], described, params_of(row)))
            first += len(row.seeds)
        return outputs


def _tell(token_ids: list[int], described: list[Numbers], params: SamplingParams) -> RowOutput:
    """The tokens with the logprobs that the parameters ask for."""
    if not params.needs_logprobs:
        return RowOutput(token_ids=token_ids)
    logprobs = None
    if params.logprobs is not None:
        logprobs = tell_tokens(token_ids, *described, num_top=params.logprobs)
    return RowOutput(token_ids=token_ids, logprobs=logprobs, token_logprobs=described[0].tolist())


def _candidates(row: ScheduledRow, token_ids: Numbers, logprobs: Numbers) -> RowOutput:
    """A beam's candidates; fewer than it wants if fewer are possible at all."""
    most = min(row.num_candidates, int((logprobs > -math.inf).sum()))
    return RowOutput(
        token_ids=[int(i) for i in token_ids[:most]], token_logprobs=logprobs[:most].tolist()
    )


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


def _draw(logits: torch.Tensor, rows: Sequence[ScheduledRow], in_batch: bool) -> torch.Tensor:
    """[num_draws] int64: a token for each seed of each row; -1 if it is not found in a batch.

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
    weights = logits.div_(temperature.float()).softmax(-1)
    # min_p and top-k each leave the largest, so either may come first.
    if any(some.min_p > 0.0 for some in params):
        least = (min_p * weights.amax(-1, keepdim=True)).float()
        # In fp32, because on a CPU comparisons that result in bools are several times slower.
        weights.mul_(torch.ge(weights, least, out=torch.empty_like(weights)))
    draws = [
        Draw(at, params[at].top_p, seed, row.start + len(row.token_ids))
        for at, row in enumerate(rows)
        for seed in row.seeds
    ]
    drawn = draw_together(weights, draws) if in_batch else draw_each(weights, draws)
    if token_ids is None:
        return drawn
    of_draws = torch.tensor([draw.row for draw in draws], device=logits.device)
    # The last column is that of -1.
    return F.pad(token_ids, (0, 1), value=-1)[of_draws, drawn]
