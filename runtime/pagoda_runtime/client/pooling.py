"""What is made of a pooler's numbers: vectors, probabilities, scores. Without numpy, which would
cost the API process its start-up for vectors of a thousand numbers."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Sequence

from pagoda_runtime.errors import RequestError, shown
from pagoda_runtime.ipc.messages import EngineReady, PoolerFacts
from pagoda_runtime.sampling_params import SamplingParams

# The engine's core ends a sequence by them; a pooler knows of one end only.
POOLING_PARAMS = SamplingParams(temperature=0.0, max_tokens=1)
_ROUTES = {
    "generate": "/v1/chat/completions and /v1/completions",
    "embed": "/v1/embeddings, /v1/score and /v1/rerank",
    "classify": "/v1/classify, and /v1/score and /v1/rerank if it has one label",
}
_VERBS = {"generate": "generates text", "embed": "embeds texts", "classify": "classifies texts"}


def verify_generates(facts: EngineReady) -> None:
    """Raise RequestError for a model that generates nothing."""
    if facts.pooler is not None:
        raise RequestError(_describe(facts.pooler.task))


def pooler_of(facts: EngineReady, *tasks: str) -> PoolerFacts:
    """The pooler. Raises RequestError for a model that does something else."""
    if facts.pooler is None or facts.pooler.task not in tasks:
        raise RequestError(_describe("generate" if facts.pooler is None else facts.pooler.task))
    return facts.pooler


def scorer_of(facts: EngineReady) -> PoolerFacts:
    """That of a model that scores pairs. Raises RequestError."""
    pooler = pooler_of(facts, "embed", "classify")
    if pooler.task == "classify" and pooler.size != 1:
        raise RequestError(
            f"This model tells {pooler.size} classes apart; a score is that of a model with one, "
            "or of an embedding model. Use /v1/classify."
        )
    return pooler


def _describe(task: str) -> str:
    return f"This model {_VERBS[task]}, and that alone: it answers {_ROUTES[task]}."


def numbers_of(pooled: bytes) -> array[float]:
    numbers = array("f")
    numbers.frombytes(pooled)
    return numbers


def to_vector(pooled: bytes, pooler: PoolerFacts, dimensions: int | None = None) -> array[float]:
    """A text's vector, cut to so many numbers that `verify_dimensions` has seen."""
    vector = numbers_of(pooled)[:dimensions]
    length = math.hypot(*vector) if pooler.is_normalized else 0.0
    return array("f", [number / length for number in vector]) if length else vector


def to_bytes(vector: array[float]) -> bytes:
    """fp32, little-endian, as OpenAI's base64 has it."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return vector.tobytes()


def verify_dimensions(dimensions: int | None, pooler: PoolerFacts) -> None:
    """Raise RequestError for a size that the model's vectors cannot be cut to."""
    size, known = pooler.size, pooler.dimensions
    if dimensions is None or dimensions == size or dimensions in (known or ()):
        return
    if known is None:
        expected = f"{size}: its config.json names no other (matryoshka_dimensions)"
    elif known:
        expected = f"one of {', '.join(map(str, sorted({*known, size})))}"
    elif 1 <= dimensions <= size:
        return
    else:
        expected = f"from 1 to {size}"
    raise RequestError(
        f"dimensions is {shown(dimensions)}; of this model it must be {expected}.",
        param="dimensions",
    )


def to_probabilities(pooled: bytes, pooler: PoolerFacts, *, activates: bool = True) -> list[float]:
    """What the classes' logits mean, or themselves."""
    logits = numbers_of(pooled).tolist()
    match pooler.activation if activates else "identity":
        case "sigmoid":
            return [_sigmoid(logit) for logit in logits]
        case "softmax":
            largest = max(logits)
            weights = [math.exp(logit - largest) for logit in logits]
            total = sum(weights)
            return [weight / total for weight in weights]
        case "tanh":
            return [math.tanh(logit) for logit in logits]
        case "identity":
            return logits


def _sigmoid(x: float) -> float:
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def score_pairs(
    pooler: PoolerFacts, first: Sequence[str], second: Sequence[str]
) -> tuple[list[tuple[str, ...]], Callable[[Sequence[bytes]], list[float]]]:
    """What has to be pooled to score pairs, and what makes their scores of that.

    A single first text goes with each of the second. A cross-encoder reads the pairs; an embedding
    model the texts, behind its prompts for queries and documents if it has them.

    Raises: RequestError: the numbers of texts do not agree.
    """
    if len(first) not in (1, len(second)):
        raise RequestError(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; text_1 must have 1, or as "
            "many as text_2.",
            param="text_1",
        )
    num_repeats = len(second) if len(first) == 1 else 1

    if pooler.task == "classify":
        pairs = list(zip([*first] * num_repeats, second, strict=True))
        return [*pairs], lambda pooled: [to_probabilities(each, pooler)[0] for each in pooled]

    def finish(pooled: Sequence[bytes]) -> list[float]:
        vectors = [numbers_of(each) for each in pooled]
        own, others = vectors[: len(first)] * num_repeats, vectors[len(first) :]
        return [cosine(one, other) for one, other in zip(own, others, strict=True)]

    query, document = (_prompt_of(pooler, kind) for kind in ("query", "document"))
    texts = [query + text for text in first] + [document + text for text in second]
    return [(text,) for text in texts], finish


def _prompt_of(pooler: PoolerFacts, input_type: str) -> str:
    """The prompt of a kind of text, or what stands before all, or nothing."""
    try:
        return find_prompt(pooler, None, input_type)
    except RequestError:
        return find_prompt(pooler, None, None)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    # math.sumprod is newer than Python 3.11.
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / lengths if lengths else 0.0


def find_prompt(pooler: PoolerFacts, prompt_name: str | None, input_type: str | None) -> str:
    """What is to stand before the texts.

    Args:
        prompt_name: as the model's files call it.
        input_type: what other services call it, as search_query or passage.
    Raises: RequestError: the model has no such prompt.
    """
    name = prompt_name if prompt_name is not None else input_type
    if name is None:
        name = pooler.default_prompt
        return "" if name is None else pooler.prompts[name]
    others = () if prompt_name is not None else INPUT_TYPES.get(name, ())
    for each in (name, *others):
        if each in pooler.prompts:
            return pooler.prompts[each]
    field = "prompt_name" if prompt_name is not None else "input_type"
    known = ", ".join(pooler.prompts) or "none"
    raise RequestError(
        f"{field} is {shown(name)}; this model has no such prompt. It has: {known}. Leave "
        f"{field} out, or write the prompt into the text.",
        param=field,
    )


_QUERY = ("query", "search_query", "web_search_query")
_DOCUMENT = ("document", "passage", "search_document", "corpus")
INPUT_TYPES = {**dict.fromkeys(_QUERY, _QUERY), **dict.fromkeys(_DOCUMENT, _DOCUMENT)}
"""input_type → names of prompts that mean the same."""
