"""How one request wants its tokens chosen and ended, and the values that it may ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_type_hints

import msgspec

from pagoda_runtime.errors import RequestError, shown

MAX_SEED = 2**63 - 1
MAX_BEAMS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
# Each makes every beam look at more continuations.
MAX_STOP_TOKEN_IDS_OF_BEAMS = 64
MAX_GRAMMAR_CHARACTERS = 262_144
_MAX_INT = 2**31 - 1
_ABOVE_0 = 5e-324


class Range(NamedTuple):
    """The numbers that a field of SamplingParams may have, both ends included, and in words."""

    lowest: float
    highest: float
    expected: str

    def holds(self, value: Any, kind: type[int] | type[float]) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            return False
        # False for NaN.
        return bool(self.lowest <= value <= self.highest)


class Entries(NamedTuple):
    """How many entries a field of SamplingParams may have, and what each has at least one of."""

    most: int
    unit: str


class Length(NamedTuple):
    """How many characters a field of SamplingParams may have."""

    most: int


_BIAS = Range(-100, 100, "from -100 to 100")
_CHOICES = Range(1, 128, "an integer from 1 to 128")
_LOGPROBS = Range(0, MAX_LOGPROBS, "an integer from 0 to 20")
_PENALTY = Range(-2, 2, "from -2 to 2")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping of one request; out-of-range values raise RequestError when verified.

    A field and its range are declared here alone: the fields of HTTP bodies and the tables of the
    reference are made from them. temperature 0 is greedy. top_k 0 or -1 means all tokens.
    max_tokens None means as many as the context holds. Stop strings are matched by the API
    process, stop token ids by the engine.
    """

    n: Annotated[int, _CHOICES] = 1
    """Choices that are returned."""
    best_of: Annotated[int | None, _CHOICES] = None
    """Choices that are generated, of which the n with the best mean logprob are returned."""
    use_beam_search: bool = False
    beam_width: Annotated[int | None, Range(1, MAX_BEAMS, "an integer from 1 to 64")] = None
    """Hypotheses that are kept at each step; by default max(n, best_of)."""
    length_penalty: Annotated[float, Range(-10, 10, "from -10 to 10")] = 1.0
    """Beams are ranked by cumulative logprob / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When beams are done: True at beam_width finished ones, False when no running beam is likely
    to beat them, "never" when none can."""
    temperature: Annotated[float, Range(0, 2, "from 0 to 2")] = 1.0
    top_p: Annotated[float, Range(_ABOVE_0, 1, "above 0 and at most 1")] = 1.0
    top_k: Annotated[
        int, Range(-1, _MAX_INT, "-1 or 0 (all tokens), or an integer of at least 1")
    ] = 0
    min_p: Annotated[float, Range(0, 1, "from 0 to 1")] = 0.0
    """Tokens less likely than this share of the likeliest one's probability are left out."""
    presence_penalty: Annotated[float, _PENALTY] = 0.0
    frequency_penalty: Annotated[float, _PENALTY] = 0.0
    # Divided by much less, logits leave the range of fp32.
    repetition_penalty: Annotated[float, Range(0.01, 10, "from 0.01 to 10")] = 1.0
    logit_bias: dict[int, float] = {}
    """Added to the logits, by token id."""
    allowed_token_ids: tuple[int, ...] | None = None
    # Each is looked for at every step.
    bad_words: Annotated[tuple[str, ...], Entries(1000, "character")] = ()
    bad_words_token_ids: Annotated[tuple[tuple[int, ...], ...], Entries(1000, "token")] = ()
    """bad_words as token ids; whoever has the tokenizer fills them in. Where they and min_tokens
    leave no token that is allowed, they give way."""
    min_tokens: Annotated[int, Range(0, _MAX_INT, "an integer of at least 0")] = 0
    """Tokens before an end token or stop id may come."""
    seed: Annotated[int | None, Range(-MAX_SEED - 1, MAX_SEED, "a 64-bit integer")] = None
    """Of the draws; None and -1: another one for each request."""
    max_tokens: Annotated[int | None, Range(1, _MAX_INT, "an integer of at least 1")] = 16
    stop: Annotated[tuple[str, ...], Entries(16, "character")] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: Annotated[int | None, _LOGPROBS] = None
    """Logprobs of each output token and of that many likeliest ones; 0: of the token alone."""
    prompt_logprobs: Annotated[int | None, _LOGPROBS] = None
    """The same for the prompt's tokens."""
    grammar: Annotated[str | None, Length(MAX_GRAMMAR_CHARACTERS)] = None
    """What each choice must be, in llguidance's Lark; `pagoda_runtime.grammar.forms` writes it for
    JSON schemas and other forms. A choice ends with "stop" where the grammar does, or by an end
    token where it may. Where other fields leave no token that the grammar allows, they give way."""

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
            # Asked of each row at each step, mostly of those with no bad words at all.
            or (self.bad_words_token_ids != () and max(map(len, self.bad_words_token_ids)) > 1)
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
        for name, kind, is_optional, limit in _LIMITS:
            value = getattr(self, name)
            if isinstance(limit, Length):
                _verify_length(name, value or "", limit)
            elif isinstance(limit, Entries):
                _verify_entries(name, value, limit)
            elif not (value is None and is_optional) and not limit.holds(value, kind):
                _refuse(name, value, f"it must be {limit.expected}")
        _verify_logit_bias(self.logit_bias)
        _verify_together(self)
        if self.use_beam_search:
            _verify_beams(self)
        else:
            _verify_choices(self)

    def verify_token_ids(self, vocab_size: int) -> None:
        """Raise RequestError for a field that names a token which the model does not have."""
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty; it must hold at least one token id.",
                param="allowed_token_ids",
            )
        fields: dict[str, Iterable[int]] = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
            "bad_words_token_ids": (token for word in self.bad_words_token_ids for token in word),
        }
        for name, token_ids in fields.items():
            for token_id in token_ids:
                if type(token_id) is not int or not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} holds token id {shown(token_id)}; the model's ids are integers "
                        f"of at least 0 and at most {vocab_size - 1}.",
                        param=name,
                    )


class FieldInfo(NamedTuple):
    """A field of SamplingParams."""

    type: Any
    limit: Range | Entries | Length | None
    default: Any

    @property
    def expected(self) -> str | None:
        """The range in words."""
        return self.limit.expected if isinstance(self.limit, Range) else None


def _read_fields() -> dict[str, FieldInfo]:
    hints = get_type_hints(SamplingParams, include_extras=True)
    defaults = zip(
        SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__, strict=True
    )
    fields = {}
    for name, default in defaults:
        limits = getattr(hints[name], "__metadata__", (None,))
        kind = get_args(hints[name])[0] if limits[0] else hints[name]
        fields[name] = FieldInfo(kind, limits[0], default)
    return fields


FIELDS = _read_fields()
# (name, type of a number, whether None is one, limit) of each field that has a limit.
_LIMITS = [
    (name, float if field.type is float else int, type(None) in get_args(field.type), field.limit)
    for name, field in FIELDS.items()
    if field.limit is not None
]
# What beams would not heed, and for some a value that asks for as little as the default.
_NOT_FOR_BEAMS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "logprobs", "prompt_logprobs", "grammar"),
)
_ASKS_FOR_NOTHING = {"temperature": 0.0, "top_k": -1, "seed": -1}
_FOR_BEAMS_ALONE = ("beam_width", "length_penalty", "early_stopping")


def _refuse(name: str, value: object, why: str) -> NoReturn:
    raise RequestError(f"{name} is {shown(value)}; {why}.", param=name)


def _verify_length(name: str, value: str, limit: Length) -> None:
    if len(value) > limit.most:
        raise RequestError(
            f"{name} has {len(value)} characters; at most {limit.most} fit.", param=name
        )


def _verify_entries(name: str, values: tuple[object, ...] | str, limit: Entries) -> None:
    if isinstance(values, str):
        _refuse(name, values, "it must be a tuple of strings")
    if len(values) > limit.most:
        raise RequestError(
            f"{name} has {len(values)} entries; at most {limit.most} fit.", param=name
        )
    if not all(values):
        raise RequestError(
            f"{name} has an empty entry; each must have at least one {limit.unit}.", param=name
        )


def _verify_logit_bias(logit_bias: dict[int, float]) -> None:
    if len(logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(logit_bias)} entries; at most {MAX_LOGIT_BIAS} fit.",
            param="logit_bias",
        )
    for token_id, value in logit_bias.items():
        if not _BIAS.holds(value, float):
            raise RequestError(
                f"logit_bias of token {shown(token_id)} is {value!r}; it must be {_BIAS.expected}.",
                param="logit_bias",
            )


def _verify_together(params: SamplingParams) -> None:
    if params.best_of is not None and params.best_of < params.n:
        _refuse("best_of", params.best_of, f"it must be at least n, which is {params.n}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        _refuse(
            "min_tokens",
            params.min_tokens,
            f"it must be at most max_tokens, which is {params.max_tokens}",
        )
    if not isinstance(params.early_stopping, bool) and params.early_stopping != "never":
        _refuse("early_stopping", params.early_stopping, 'it must be true, false or "never"')


def _verify_choices(params: SamplingParams) -> None:
    """Without beams: several choices are drawn, and fields of beams ask for nothing."""
    if params.is_greedy and params.num_sequences > 1:
        name = "n" if params.n > 1 else "best_of"
        greedy = f"top_k {params.top_k}" if params.top_k == 1 else "temperature 0"
        _refuse(
            name,
            getattr(params, name),
            f"with {greedy} all choices would be the same, so it must be 1. Raise temperature "
            "(and top_k, if it is 1), or ask for one choice",
        )
    for name in _FOR_BEAMS_ALONE:
        value = getattr(params, name)
        if value != FIELDS[name].default:
            _refuse(
                name, value, "it is for beams alone. Leave it out, or set use_beam_search to true"
            )


def _verify_beams(params: SamplingParams) -> None:
    for name in _NOT_FOR_BEAMS:
        value, default = getattr(params, name), FIELDS[name].default
        if value not in (default, _ASKS_FOR_NOTHING.get(name, default)) and value != []:
            _refuse(name, value, "use_beam_search does not heed it. Leave one of the two out")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS_OF_BEAMS:
        raise RequestError(
            f"stop_token_ids has {len(params.stop_token_ids)} entries; with use_beam_search at "
            f"most {MAX_STOP_TOKEN_IDS_OF_BEAMS} fit.",
            param="stop_token_ids",
        )
    width = params.num_beams
    if width > MAX_BEAMS:
        name = "n" if params.best_of is None else "best_of"
        _refuse(name, width, f"with use_beam_search it must be at most {MAX_BEAMS}")
    if params.n > width:
        _refuse("n", params.n, f"it must be at most beam_width, which is {width}")
    if params.best_of not in (None, width):
        _refuse(
            "best_of",
            params.best_of,
            f"with use_beam_search it must be beam_width, which is {width}, or left out",
        )
