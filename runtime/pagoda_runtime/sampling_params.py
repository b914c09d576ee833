"""How one request wants its tokens chosen and ended."""

from __future__ import annotations

import msgspec

from pagoda_runtime.sampling_limits import MAX_SEED as MAX_SEED
from pagoda_runtime.sampling_limits import verify_sampling_params


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping of one request; out-of-range values raise RequestError when verified.

    temperature 0 is greedy. top_k 0 or -1 means all tokens. max_tokens None means as many as the
    context holds. Stop strings are matched by the API process, stop token ids by the engine.
    """

    n: int = 1
    """Choices that are returned."""
    best_of: int | None = None
    """Choices that are generated, of which the n with the best mean logprob are returned."""
    use_beam_search: bool = False
    beam_width: int | None = None
    """Hypotheses that are kept at each step; by default max(n, best_of)."""
    length_penalty: float = 1.0
    """Beams are ranked by cumulative logprob / length ** length_penalty."""
    early_stopping: bool | str = False
    """When beams are done: True at beam_width finished ones, False when no running beam is likely
    to beat them, "never" when none can."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are left out."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    """Added to the logits, by token id."""
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """bad_words as token ids; whoever has the tokenizer fills them in. Where they and min_tokens
    leave no token that is allowed, they give way."""
    min_tokens: int = 0
    """Tokens before an end token or stop id may come."""
    seed: int | None = None
    """Of the draws; None and -1: another one for each request."""
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Logprobs of each output token and of that many likeliest ones; 0: of the token alone."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    @property
    def num_sequences(self) -> int:
        """Sequences that run for the request at once."""
        return self.num_beams if self.use_beam_search else self.best_of or self.n

    @property
    def num_choices(self) -> int:
        """Choices that the engine tells of; of beams only those that are returned."""
        return self.n if self.use_beam_search else self.num_sequences

    @property
    def num_beams(self) -> int:
        return self.beam_width or self.best_of or self.n

    @property
    def fixed_seed(self) -> int | None:
        return None if self.seed == -1 else self.seed

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or any(len(word) > 1 for word in self.bad_words_token_ids)
        )

    @property
    def needs_logprobs(self) -> bool:
        """Whether the logprob of each drawn token is wanted."""
        return self.logprobs is not None or (self.best_of or self.n) > self.n

    @property
    def is_greedy(self) -> bool:
        # Below this, logits divided by the temperature leave the range of fp32 softmax.
        return self.temperature < 1e-5 or self.top_k == 1

    def verify(self) -> None:
        """Raise RequestError that names field, value and range for the first value out of range."""
        verify_sampling_params(self)
