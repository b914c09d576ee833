"""The values that sampling parameters may have, alone and together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pagoda_runtime.errors import RequestError, shown

if TYPE_CHECKING:
    from pagoda_runtime.sampling_params import SamplingParams

MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_BEAMS = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 300
# Each is looked for at every step.
MAX_BAD_WORDS = 1000
# Each makes every beam look at more continuations.
MAX_STOP_TOKEN_IDS_OF_BEAMS = 64
_MAX_INT = 2**31 - 1
_ABOVE_0 = 5e-324


class _Number(NamedTuple):
    """A field whose value is a number, or None if that is its default."""

    name: str
    type: type[int] | type[float]
    lowest: float
    highest: float
    expected: str
    is_optional: bool = False

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.is_optional
        if isinstance(value, bool) or not isinstance(value, (int, self.type)):
            return False
        # False for NaN.
        return bool(self.lowest <= value <= self.highest)


_NUMBERS = (
    _Number("n", int, 1, MAX_CHOICES, "an integer from 1 to 128"),
    _Number("best_of", int, 1, MAX_CHOICES, "an integer from 1 to 128", True),
    _Number("temperature", float, 0, 2, "from 0 to 2"),
    _Number("top_p", float, _ABOVE_0, 1, "above 0 and at most 1"),
    _Number("top_k", int, -1, _MAX_INT, "-1 or 0 (all tokens), or an integer of at least 1"),
    _Number("min_p", float, 0, 1, "from 0 to 1"),
    _Number("presence_penalty", float, -2, 2, "from -2 to 2"),
    _Number("frequency_penalty", float, -2, 2, "from -2 to 2"),
    # Divided by much less, logits leave the range of fp32.
    _Number("repetition_penalty", float, 0.01, 10, "from 0.01 to 10"),
    _Number("min_tokens", int, 0, _MAX_INT, "an integer of at least 0"),
    _Number("max_tokens", int, 1, _MAX_INT, "an integer of at least 1", True),
    _Number("seed", int, -MAX_SEED - 1, MAX_SEED, "a 64-bit integer", True),
    _Number("logprobs", int, 0, MAX_LOGPROBS, "an integer from 0 to 20", True),
    _Number("prompt_logprobs", int, 0, MAX_LOGPROBS, "an integer from 0 to 20", True),
    _Number("beam_width", int, 1, MAX_BEAMS, "an integer from 1 to 64", True),
    _Number("length_penalty", float, -10, 10, "from -10 to 10"),
)
# What beams would not heed, and the values that ask for nothing.
_NOT_FOR_BEAMS: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, 0.0),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "seed": (None, -1),
    "stop": ((),),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}
_FOR_BEAMS_ALONE: dict[str, Any] = {
    "beam_width": None,
    "length_penalty": 1.0,
    "early_stopping": False,
}


def verify_sampling_params(params: SamplingParams) -> None:
    """Raise RequestError that names field, value and range for the first value out of range."""
    for number in _NUMBERS:
        value = getattr(params, number.name)
        if not number.holds(value):
            _refuse(number.name, value, f"it must be {number.expected}")
    _verify_words(params)
    _verify_logit_bias(params)
    _verify_together(params)
    if params.use_beam_search:
        _verify_beams(params)
    else:
        _verify_choices(params)


def verify_token_id_fields(params: SamplingParams, *, vocab_size: int) -> None:
    """Raise RequestError for a field that names a token which the model does not have."""
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids is empty; it must hold at least one token id.",
            param="allowed_token_ids",
        )
    fields: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "bad_words_token_ids": (token for word in params.bad_words_token_ids for token in word),
    }
    for name, token_ids in fields.items():
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{name} holds token id {shown(token_id)}; the model's ids are integers of at "
                    f"least 0 and at most {vocab_size - 1}.",
                    param=name,
                )


def _refuse(name: str, value: object, why: str) -> NoReturn:
    raise RequestError(f"{name} is {shown(value)}; {why}.", param=name)


def _verify_words(params: SamplingParams) -> None:
    """Stop strings and bad words: how many, and none of them empty."""
    for name, most, unit in (
        ("stop", MAX_STOP_STRINGS, "character"),
        ("bad_words", MAX_BAD_WORDS, "character"),
        ("bad_words_token_ids", MAX_BAD_WORDS, "token"),
    ):
        words = getattr(params, name)
        if isinstance(words, str):
            _refuse(name, words, "it must be a tuple of strings")
        if len(words) > most:
            raise RequestError(f"{name} has {len(words)} entries; at most {most} fit.", param=name)
        if not all(words):
            raise RequestError(
                f"{name} has an empty entry; each must have at least one {unit}.", param=name
            )


def _verify_logit_bias(params: SamplingParams) -> None:
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries; at most {MAX_LOGIT_BIAS} fit.",
            param="logit_bias",
        )
    bias = _Number("logit_bias", float, -100, 100, "from -100 to 100")
    for token_id, value in params.logit_bias.items():
        if not bias.holds(value):
            raise RequestError(
                f"logit_bias of token {shown(token_id)} is {value!r}; it must be {bias.expected}.",
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
    for name, neutral in _FOR_BEAMS_ALONE.items():
        value = getattr(params, name)
        if value != neutral:
            _refuse(
                name, value, "it is for beams alone. Leave it out, or set use_beam_search to true"
            )


def _verify_beams(params: SamplingParams) -> None:
    for name, neutral in _NOT_FOR_BEAMS.items():
        value = getattr(params, name)
        if value not in neutral and value != []:
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
