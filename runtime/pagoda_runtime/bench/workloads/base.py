"""What a workload is: a name, its flags, and the requests it makes."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# One token each in most vocabularies, with the space before it.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law"
)
WORDS = tuple(_TEXT.split())
# Special tokens and, in byte-level vocabularies, control characters are mostly below.
FIRST_TOKEN_ID = 100


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a workload."""

    prompt_token_ids: list[int]
    output_len: int
    """Tokens to generate."""
    arrival_seconds: float | None = None
    """Since the workload's start; None: the workload does not say when."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of prompts."""

    name: str
    help: str
    add_flags: Callable[[argparse._ArgumentGroup], None]
    make_requests: Callable[[argparse.Namespace, int, random.Random], list[BenchRequest]]
    """(flags, vocab_size, rng) → at most `num_prompts` requests. Raises RequestError."""


def random_token_ids(num_tokens: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Uniform over the vocabulary but for its beginning."""
    low = min(FIRST_TOKEN_ID, vocab_size // 2)
    return rng.choices(range(low, vocab_size), k=num_tokens)


def render_words(token_ids: Sequence[int]) -> str:
    """A text of about as many tokens: equal ids become equal words, so shared prefixes stay."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in token_ids)
