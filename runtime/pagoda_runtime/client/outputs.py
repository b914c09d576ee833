"""What the offline class returns, and how it is put together from the engine's deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pagoda_runtime.ipc.messages import RequestDelta, TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was at its place."""

    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    """All tokens that were generated, the end token and those of a stop string included."""
    finish_reason: str
    """stop (end token, stop id or stop string) or length."""
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for the model's end token and for length."""
    cumulative_logprob: float | None = None
    """Sum over the tokens, for beams and if logprobs or best_of were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: itself and then the likeliest ones, by token id."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What came of one prompt."""

    request_id: str
    prompt: str | None
    """None if the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """n of them; of beams and of best_of above n the best, best first."""
    num_cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt token as `CompletionOutput.logprobs`; None for the first, as nothing came
    before it."""


def engine_params(params: SamplingParams) -> SamplingParams:
    """What to ask the engine for, so that a Collector can tell the best of several choices.

    The engine's sum of logprobs may count tokens behind a stop string, of which it does not know.
    """
    if params.needs_logprobs and params.logprobs is None and params.stop:
        return msgspec.structs.replace(params, logprobs=0)
    return params


class Collector:
    """Takes the deltas of one request.

    Args:
        params: as the user gave them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.num_cached_tokens = 0
        self._tokenizer = tokenizer
        self._params = params
        self._prompt_token_ids = prompt_token_ids
        self._eos_token_ids = eos_token_ids
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._choices: dict[int, _Choice] = {}

    def take(self, delta: RequestDelta) -> bool:
        """Add a delta; whether a stop string ended the choice, so that no more of it is wanted."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = self.num_cached_tokens or delta.num_cached_tokens
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = _Choice(
                IncrementalDetokenizer(
                    self._tokenizer,
                    self._params,
                    prompt_token_ids=self._prompt_token_ids,
                    eos_token_ids=self._eos_token_ids,
                )
            )
        return choice.take(delta)

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated, over all choices."""
        return sum(len(choice.token_ids) for choice in self._choices.values())

    def outputs(self) -> list[CompletionOutput]:
        """The n choices that are returned, once all have ended."""
        params = self._params
        choices = [choice for _, choice in sorted(self._choices.items())]
        if len(choices) > params.n:
            choices = sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)
        return [
            choice.to_output(
                index, None if params.logprobs is None else self._describe(choice.logprobs)
            )
            for index, choice in enumerate(choices[: params.n])
        ]

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """As in RequestOutput."""
        if self._params.prompt_logprobs is None:
            return None
        return [None, *self._describe(self._prompt_logprobs or ())]

    def _describe(self, tokens: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
        text = self._tokenizer.token_text
        described = []
        for token in tokens:
            shown = {token.token_id: Logprob(token.logprob, token.rank, text(token.token_id))}
            for rank, (token_id, logprob) in enumerate(token.top, start=1):
                shown.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
            described.append(shown)
        return described


class _Choice:
    """One choice in the making."""

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._detokenizer = detokenizer
        self._text: list[str] = []
        self._cumulative_logprob: float | None = None
        self._finish_reason = "length"
        self._stop_reason: int | str | None = None

    def take(self, delta: RequestDelta) -> bool:
        """Whether a stop string ended it now, before the engine did."""
        detokenizer = self._detokenizer
        self._text.append(detokenizer.push(delta.new_token_ids))
        num_taken = detokenizer.num_tokens - len(self.token_ids)
        self.token_ids += delta.new_token_ids[:num_taken]
        self.logprobs += (delta.logprobs or [])[:num_taken]
        self._cumulative_logprob = delta.cumulative_logprob
        is_stopped = detokenizer.stopped_by is not None
        if delta.finish_reason is not None and not is_stopped:
            self._text.append(detokenizer.finish())
            self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        if detokenizer.stopped_by is not None:
            self._finish_reason, self._stop_reason = "stop", detokenizer.stopped_by
        return is_stopped and delta.finish_reason is None

    @property
    def cumulative_logprob(self) -> float | None:
        if self.logprobs:
            return sum(token.logprob for token in self.logprobs)
        return self._cumulative_logprob

    @property
    def mean_logprob(self) -> float:
        return (self.cumulative_logprob or 0.0) / max(1, len(self.token_ids))

    def to_output(self, index: int, logprobs: list[dict[int, Logprob]] | None) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text="".join(self._text),
            token_ids=self.token_ids,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=logprobs,
        )
