"""Gemma 3 270M, a real checkpoint: the same greedy tokens as transformers in fp32."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

NUM_TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first human being",
    "Die Hauptstadt von Deutschland ist",
    "La plus haute montagne du monde est",
    "1, 1, 2, 3, 5, 8,",
    "SELECT name, age FROM users WHERE",
    "The mitochondria is",
    "To make a good omelette, first",
    '{"name": "Alice", "age":',
    "Shakespeare wrote many plays, among them",
    "The opposite of hot is",
    "A queue is a data structure in which",
    "Dear Sir or Madam,\n\nI am writing to",
    "The speed of light in a vacuum is",
    "import numpy as np\n\nx = np.",
    "Q: What is the largest planet of the solar system?\nA:",
]


@pytest.fixture(scope="module")
def gemma() -> Path:
    cache = Path(os.environ.get("PAGODA_CACHE", "~/.cache/pagoda")).expanduser()
    folder = cache / "model" / "gemma-3-270m"
    if not (folder / "config.json").exists():
        pytest.fail(f"{folder} is missing: run `make model`, which converts Gemma 3 270M.")
    return folder


def transformers_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """In one batch, padded on the left."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, longest:].tolist()


@pytest.mark.model
@pytest.mark.slow
def test_greedy_tokens_of_20_prompts_equal_those_of_transformers(gemma):
    tokenizer = load_tokenizer(gemma)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    runner = ModelRunner(
        EngineConfig(model=str(gemma), dtype="float32", kv_cache_memory_bytes=1 << 28)
    )
    assert generate(runner, prompts, NUM_TOKENS) == transformers_tokens(gemma, prompts)


@pytest.mark.model
def test_greedy_tokens_are_the_same_with_logprobs(gemma):
    tokenizer = load_tokenizer(gemma)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:6]]
    runner = ModelRunner(EngineConfig(model=str(gemma), kv_cache_memory_bytes=1 << 28))
    expected = generate(runner, prompts, 64)
    for asked in ({"logprobs": 2}, {"best_of": 2}):
        params = [SamplingParams(temperature=0.0, **asked)] * len(prompts)
        assert generate(runner, prompts, 64, params=params) == expected


@pytest.mark.model
def test_the_tokenizer_equals_that_of_transformers(gemma):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(gemma), AutoTokenizer.from_pretrained(gemma)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    for text in [*PROMPTS, "", "naïve 日本語 \U0001f600", "<bos>twice", "  two  spaces\n\n"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours.eos_token_id == theirs.eos_token_id
