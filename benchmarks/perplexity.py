"""How well a model foretells a text, whatever is rounded in it."""

from __future__ import annotations

import math
import pydoc_data.topics
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from pagoda_runtime import LLM, SamplingParams


class Score(NamedTuple):
    perplexity: float
    likeliest: list[int]
    """At every position, the token that the model would put next."""


def windows_of_text(folder: Path, num_windows: int, num_tokens: int) -> list[list[int]]:
    """Token ids of the English text of Python's own help, the same in all runs of a version."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    token_ids = tokenizer(text)["input_ids"]
    starts = range(0, num_windows * num_tokens, num_tokens)
    return [token_ids[start : start + num_tokens] for start in starts]


def score(llm: LLM, windows: list[list[int]]) -> Score:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": window} for window in windows]
    total, likeliest = 0.0, []
    for window, output in zip(windows, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for token_id, logprobs in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            total -= logprobs[token_id].logprob
            likeliest.append(min(logprobs, key=lambda other: logprobs[other].rank))
    return Score(math.exp(total / len(likeliest)), likeliest)


def agreement(score: Score, exact: Score) -> float:
    """Part of the positions with the same likeliest token."""
    pairs = zip(score.likeliest, exact.likeliest, strict=True)
    return sum(a == b for a, b in pairs) / len(exact.likeliest)
