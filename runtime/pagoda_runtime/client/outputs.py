"""What the offline class returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagoda_runtime.client.output_processor import WholeChoice, pick_best
from pagoda_runtime.ipc.messages import TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams
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


def make_outputs(
    tokenizer: Tokenizer, params: SamplingParams, choices: Sequence[WholeChoice]
) -> list[CompletionOutput]:
    """The n choices that are returned, once all have ended."""
    return [
        CompletionOutput(
            index=index,
            text=choice.text,
            token_ids=choice.token_ids,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            cumulative_logprob=choice.cumulative_logprob,
            logprobs=None if params.logprobs is None else describe(tokenizer, choice.logprobs),
        )
        for index, choice in enumerate(pick_best(choices, params.n))
    ]


def describe(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
    """For each token: itself and then the likeliest ones, by token id."""
    text = tokenizer.token_text
    described = []
    for token in tokens:
        shown = {token.token_id: Logprob(token.logprob, token.rank, text(token.token_id))}
        for rank, (token_id, logprob) in enumerate(token.top, start=1):
            shown.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
        described.append(shown)
    return described
