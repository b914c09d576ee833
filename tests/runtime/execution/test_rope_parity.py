"""Greedy tokens beyond the original context equal transformers', for the ropes that extend it."""

from __future__ import annotations

import random

import pytest

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.testing import make_tiny_checkpoint

NUM_TOKENS = 16
ORIGINAL, EXTENDED = 40, 160
HEAD_DIM = 16
DIVISORS = [1.0 + i / 8 for i in range(HEAD_DIM // 2)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": DIVISORS,
    "long_factor": [3 * divisor for divisor in DIVISORS],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": HEAD_DIM},
    "gemma3_text": {"head_dim": HEAD_DIM, "max_position_embeddings": EXTENDED},
}


def make_checkpoint(folder, family, rope):
    # Files with dynamic rope name the original positions.
    positions = ORIGINAL if rope["rope_type"] == "dynamic" else EXTENDED
    parameters = {"rope_theta": 1e4, **rope}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 1e4}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    settings = {**FAMILIES[family], "max_position_embeddings": positions}
    return make_tiny_checkpoint(folder, family, **settings, rope_parameters=parameters)


def make_runner(folder, max_model_len=EXTENDED):
    return ModelRunner(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            block_size=8,
            num_threads=1,
            kv_cache_memory_bytes=1 << 24,
            max_model_len=max_model_len,
        )
    )


def make_prompts(lengths):
    rng = random.Random(0)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_within_and_beyond_the_original_context(family, tmp_path):
    make_checkpoint(tmp_path, family, YARN)
    prompts = make_prompts([5, ORIGINAL - 4, EXTENDED - NUM_TOKENS])
    expected = transformers_tokens(tmp_path, prompts, NUM_TOKENS)
    assert generate(make_runner(tmp_path), prompts, NUM_TOKENS) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_longrope_takes_its_long_divisors_if_a_sequence_may_be_long(family, tmp_path):
    make_checkpoint(tmp_path, family, LONGROPE)
    # transformers takes them for a prompt that is long.
    prompts = make_prompts([ORIGINAL + 1, EXTENDED - NUM_TOKENS])
    expected = transformers_tokens(tmp_path, prompts, NUM_TOKENS)
    assert generate(make_runner(tmp_path), prompts, NUM_TOKENS) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_rope_is_sized_by_the_longest_sequence(family, tmp_path):
    make_checkpoint(tmp_path, family, DYNAMIC)
    prompts = make_prompts([ORIGINAL + 1, EXTENDED - NUM_TOKENS])
    expected = transformers_tokens(tmp_path, prompts, NUM_TOKENS, longest=EXTENDED)
    assert generate(make_runner(tmp_path), prompts, NUM_TOKENS) == expected


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_an_engine_for_short_sequences_computes_as_the_model_was_trained(rope, tmp_path):
    make_checkpoint(tmp_path, "llama", rope)
    prompts = make_prompts([3, ORIGINAL - NUM_TOKENS])
    expected = transformers_tokens(tmp_path, prompts, NUM_TOKENS)
    assert generate(make_runner(tmp_path, ORIGINAL), prompts, NUM_TOKENS) == expected
    assert generate(make_runner(tmp_path, EXTENDED), prompts, NUM_TOKENS) != expected


@pytest.mark.parametrize("rope", [YARN, DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_chunks_of_a_long_prompt_give_the_tokens_of_the_whole(rope, tmp_path):
    make_checkpoint(tmp_path, "llama", rope)
    runner = make_runner(tmp_path)
    prompts = make_prompts([EXTENDED - NUM_TOKENS, ORIGINAL])
    whole = generate(runner, prompts, NUM_TOKENS)
    assert generate(runner, prompts, NUM_TOKENS, chunk_size=9) == whole


def test_without_a_limit_the_model_is_served_as_far_as_its_rope_reaches(tmp_path):
    for rope in (YARN, DYNAMIC, LONGROPE):
        make_checkpoint(tmp_path, "llama", rope)
        assert make_runner(tmp_path, None).max_model_len == EXTENDED
        with pytest.raises(FatalError, match=f"at most {EXTENDED}"):
            make_runner(tmp_path, EXTENDED + 1)
