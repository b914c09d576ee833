"""From the engine's tokens to the text of a request's choices, for the server and for `LLM`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from pagoda_runtime.ipc.messages import FinishReason, RequestDelta, TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.detokenizer import NO_IDS, IncrementalDetokenizer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

C = TypeVar("C", bound="WholeChoice")


class ShownToken(msgspec.Struct, frozen=True):
    """A token in a text. logprobs is None for the first one of a prompt: nothing came before it."""

    offset: int
    """The character of the text at which it begins."""
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt as each choice begins with it."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]
    """Where in the text each token begins; empty without logprobs."""

    def shown(self, prompt_logprobs: Sequence[TokenLogprobs]) -> list[ShownToken]:
        """The prompt's tokens. prompt_logprobs are those of the second and later ones."""
        logprobs = [None, *prompt_logprobs]
        return [
            ShownToken(*token) for token in zip(self.offsets, self.token_ids, logprobs, strict=True)
        ]


class TextDelta(msgspec.Struct, frozen=True):
    """What came for one choice: text that may be empty, and tokens."""

    index: int
    text: str
    token_ids: list[int]
    """Those that the engine generated behind a stop string, before it was told, are left out."""
    logprobs: list[TokenLogprobs] | None
    """Of token_ids."""
    shown: list[ShownToken]
    """The tokens of the text, if they are shown."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop string or stop token id that ended it."""
    cumulative_logprob: float | None
    """Of the choice's tokens so far."""


@dataclass(slots=True)
class WholeChoice:
    """A choice in one piece, made of its deltas."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    shown: list[ShownToken] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None

    def take(self, delta: TextDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
        self.shown += delta.shown
        self.cumulative_logprob = delta.cumulative_logprob
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        return (self.cumulative_logprob or 0.0) / max(1, len(self.token_ids))


def pick_best(choices: Sequence[C], most: int) -> list[C]:
    """The likeliest choices, by mean logprob of a token, best first; all in order if all fit."""
    begun = [choice for choice in choices if choice.texts]
    if len(begun) <= most:
        return begun
    return sorted(begun, key=lambda choice: choice.mean_logprob, reverse=True)[:most]


def engine_params(params: SamplingParams) -> SamplingParams:
    """What to ask the engine for, so that the best of several choices can be told.

    The engine's sum of logprobs may count tokens behind a stop string, of which it does not know.
    """
    if params.needs_logprobs and params.logprobs is None and params.stop:
        return msgspec.structs.replace(params, logprobs=0)
    return params


class OutputProcessor:
    """Takes the deltas of one request.

    Args:
        params: as the user gave them.
        eos_token_ids: the model's end tokens.
        first_index: of the request's choices in the answer.
        shows_tokens: whether tokens are told beside the text; then logprobs must come with them.
        echo: what each choice begins with.
        shown_special_ids: special tokens that give text in any case.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        eos_token_ids: Sequence[int] = (),
        first_index: int = 0,
        shows_tokens: bool = False,
        echo: Echo | None = None,
        shown_special_ids: frozenset[int] = NO_IDS,
    ) -> None:
        self.num_open = params.num_choices
        """Choices that have not ended."""
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        """Of the prompt's second and later tokens."""
        self._first_index = first_index
        self._choices = [
            _Choice(
                IncrementalDetokenizer(
                    tokenizer,
                    params,
                    prompt_token_ids=prompt_token_ids,
                    eos_token_ids=eos_token_ids,
                    num_characters_before=0 if echo is None else len(echo.text),
                    shown_special_ids=shown_special_ids,
                ),
                shows_tokens,
                echo,
            )
            for _ in range(self.num_open)
        ]

    def take(self, delta: RequestDelta) -> TextDelta:
        """The text that is certain now; the last one of a choice has a finish_reason.

        If the delta has none, a stop string ended the choice, and the engine is to be told.
        """
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        choice = self._choices[delta.index]
        text, num_tokens, shown = choice.push(delta, self.prompt_logprobs)
        if choice.finish_reason is not None:
            self.num_open -= 1
        if num_tokens < len(delta.new_token_ids):
            delta = _first_tokens(delta, num_tokens)
        return TextDelta(
            self._first_index + delta.index,
            text,
            delta.new_token_ids,
            delta.logprobs,
            shown,
            choice.finish_reason,
            choice.stop_reason,
            delta.cumulative_logprob,
        )


def _first_tokens(delta: RequestDelta, num_tokens: int) -> RequestDelta:
    """The delta without the tokens behind the first num_tokens."""
    logprobs, total = delta.logprobs or [], delta.cumulative_logprob
    if total is not None:
        total -= sum(token.logprob for token in logprobs[num_tokens:])
    return msgspec.structs.replace(
        delta,
        new_token_ids=delta.new_token_ids[:num_tokens],
        logprobs=logprobs[:num_tokens],
        cumulative_logprob=total,
    )


@dataclass(slots=True)
class _Choice:
    """The text of one choice in the making, and the tokens that it shows."""

    detokenizer: IncrementalDetokenizer
    shows_tokens: bool
    echo: Echo | None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    waiting: list[ShownToken] = field(default_factory=list)
    """Tokens whose text is held back."""

    def push(
        self, delta: RequestDelta, prompt_logprobs: Sequence[TokenLogprobs] | None
    ) -> tuple[str, int, list[ShownToken]]:
        """The text that is certain now, the number of new tokens, and those that the text shows.

        Tokens behind a stop string, which came before the engine was told, are not counted. A token
        is shown together with the beginning of its text, one without text once nothing before it is
        held back. What a stop string cut off is not shown.
        """
        detokenizer = self.detokenizer
        num_before = detokenizer.num_tokens
        if self.shows_tokens:
            text = self._push_one_by_one(delta)
        else:
            text = detokenizer.push(delta.new_token_ids)
        if detokenizer.stopped_by is None and delta.finish_reason is not None:
            text += detokenizer.finish()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if detokenizer.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped_by
        shown = self._release() if self.shows_tokens else []
        if self.echo is not None:
            text = self.echo.text + text
            if self.shows_tokens:
                shown = self.echo.shown(prompt_logprobs or ()) + shown
            self.echo = None
        return text, detokenizer.num_tokens - num_before, shown

    def _push_one_by_one(self, delta: RequestDelta) -> str:
        detokenizer, text = self.detokenizer, ""
        for token_id, logprobs in zip(delta.new_token_ids, delta.logprobs or (), strict=True):
            if detokenizer.stopped_by is not None:
                break
            self.waiting.append(ShownToken(detokenizer.num_decoded, token_id, logprobs))
            text += detokenizer.push((token_id,))
        return text

    def _release(self) -> list[ShownToken]:
        detokenizer, waiting = self.detokenizer, self.waiting
        num_shown = detokenizer.num_shown
        is_all_shown = detokenizer.stopped_by is None and (
            self.finish_reason is not None or detokenizer.is_certain
        )
        released = [token for token in waiting if is_all_shown or token.offset < num_shown]
        self.waiting = waiting[len(released) :]
        return released
