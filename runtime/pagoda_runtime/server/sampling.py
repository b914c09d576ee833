"""From the body of a request to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pagoda_runtime.errors import RequestError
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.protocol import SAME_FORM, GenerationRequest
from pagoda_runtime.tokenizer.tokenizer import Tokenizer, add_bad_words


def to_sampling_params(
    body: GenerationRequest,
    tokenizer: Tokenizer,
    defaults: Mapping[str, float | int],
    grammar: str | None = None,
) -> SamplingParams:
    """The parameters of a body, max_tokens left open.

    Args:
        defaults: the checkpoint's, by field. Beams do without: they search.
    Raises: RequestError: a value is out of range, or the body's fields contradict each other.
    """
    asked = {name: v for name in SAME_FORM if (v := getattr(body, name)) is not None}
    values: dict[str, Any] = {} if asked.get("use_beam_search") else dict(defaults)
    values |= {**asked, "max_tokens": None}
    stop, allowed = body.stop or (), body.allowed_token_ids
    params = SamplingParams(
        **values,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()},
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words=tuple(body.bad_words or ()),
        logprobs=body.num_logprobs,
        grammar=grammar,
    )
    params.verify()
    _verify_body(body, params)
    if body.is_echo and params.logprobs is not None:
        most = max(params.logprobs, params.prompt_logprobs or 0)
        params = msgspec.structs.replace(params, prompt_logprobs=most)
    return add_bad_words(tokenizer, params)


def _verify_body(body: GenerationRequest, params: SamplingParams) -> None:
    """Fields that contradict each other, as far as the engine does not know of them."""
    if isinstance(body, ChatCompletionRequest) and body.top_logprobs and not body.logprobs:
        raise RequestError(
            f"top_logprobs is {body.top_logprobs}; it asks for `logprobs: true` beside it.",
            param="top_logprobs",
        )
    if not body.stream:
        return
    if params.prompt_logprobs is not None:
        raise RequestError(
            f"prompt_logprobs is {params.prompt_logprobs}; they come only without `stream: true`.",
            param="prompt_logprobs",
        )
    if (params.best_of or 0) > params.n and not params.use_beam_search:
        raise RequestError(
            f"best_of is {params.best_of} and n is {params.n}; the best are known at the end, so "
            "best_of above n comes only without `stream: true`.",
            param="best_of",
        )
