"""Beam search over the candidates of each step. Pure: numbers in, decisions out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagoda_runtime.ipc.messages import FinishReason
from pagoda_runtime.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next step: beam `parent` of this one, and a token."""

    parent: int
    token_id: int
    cumulative_logprob: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam."""

    token_ids: list[int]
    """Output tokens, the end token included."""
    cumulative_logprob: float
    score: float
    """cumulative_logprob / len(token_ids) ** length_penalty"""
    finish_reason: FinishReason
    stop_reason: int | None


class BeamSearch:
    """Keeps the likeliest beams, and the best finished ones.

    At each step the likeliest continuations of all beams are ranked. Those that end are finished
    hypotheses if they stand among the first beam_width; the first beam_width of the others live on.
    The rules, ends and scores included, are those of transformers' `generate(num_beams=…)`, so
    that both give the same results.

    Args:
        max_tokens: output tokens at which every beam ends.
    """

    def __init__(
        self, params: SamplingParams, *, eos_token_ids: Iterable[int], max_tokens: int
    ) -> None:
        self.params = params
        self.width = params.num_beams
        self.max_tokens = max_tokens
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.end_token_ids = self.stop_token_ids | (
            frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        )
        self.finished: list[Hypothesis] = []
        """The best so far, best first, at most beam_width."""
        self.is_done = False
        self._num_tokens = 0

    @property
    def num_candidates(self) -> int:
        """Continuations to look at for each beam: enough that beam_width of them do not end."""
        return self.width + len(self.end_token_ids)

    def advance(
        self,
        outputs: Sequence[Sequence[int]],
        cumulative_logprobs: Sequence[float],
        candidates: Sequence[Sequence[tuple[int, float]]],
    ) -> list[Continuation]:
        """Take one step; the beams of the next one, likeliest first, or none when all is done.

        Args:
            outputs: the output tokens of each beam so far.
            cumulative_logprobs: of each beam.
            candidates: for each beam its likeliest num_candidates tokens with their logprobs.
        """
        assert not self.is_done
        self._num_tokens += 1
        ranked = sorted(
            (
                Continuation(parent, token_id, before + logprob)
                for parent, (before, tokens) in enumerate(
                    zip(cumulative_logprobs, candidates, strict=True)
                )
                for token_id, logprob in tokens
            ),
            key=lambda c: -c.cumulative_logprob,
        )
        if self._num_tokens >= self.max_tokens:
            self._finish(ranked[: self.width], outputs)
            self.is_done = True
            return []
        ended = [c for c in ranked[: self.width] if c.token_id in self.end_token_ids]
        self._finish(ended, outputs)
        running = [c for c in ranked if c.token_id not in self.end_token_ids][: self.width]
        self.is_done = not running or not self._can_improve(running[0].cumulative_logprob)
        return [] if self.is_done else running

    def _finish(self, ended: Sequence[Continuation], outputs: Sequence[Sequence[int]]) -> None:
        found = [self._make_hypothesis(c, outputs[c.parent]) for c in ended]
        # A stable sort, so that of equals the earlier one stays ahead.
        self.finished = sorted([*self.finished, *found], key=lambda h: -h.score)[: self.width]

    def _make_hypothesis(self, last: Continuation, output: Sequence[int]) -> Hypothesis:
        token_ids = [*output, last.token_id]
        is_end = last.token_id in self.end_token_ids
        return Hypothesis(
            token_ids=token_ids,
            cumulative_logprob=last.cumulative_logprob,
            score=last.cumulative_logprob / len(token_ids) ** self.params.length_penalty,
            finish_reason="stop" if is_end else "length",
            stop_reason=last.token_id if last.token_id in self.stop_token_ids else None,
        )

    def _can_improve(self, best_running: float) -> bool:
        """Whether to go on, when the likeliest running beam has this cumulative logprob."""
        if len(self.finished) < self.width:
            return True
        early_stopping, penalty = self.params.early_stopping, self.params.length_penalty
        if early_stopping is True:
            return False
        # A positive penalty favours long outputs: the longest one is the best that can still come.
        length = self._num_tokens
        if early_stopping == "never" and penalty > 0.0:
            length = self.max_tokens
        return bool(best_running / length**penalty > self.finished[-1].score)
