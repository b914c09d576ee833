"""The whole engine on Triton's kernels: every operation that has one, for tiny models in fp32."""

from __future__ import annotations

import random

import pytest
import torch

from pagoda_kernels.paged_attention import make_backend
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_kernels.testing import watch_moves
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.testing import make_tiny_checkpoint

NUM_TOKENS = 5


def make_prompts(lengths):
    rng = random.Random(0)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


PROMPTS = make_prompts([1, 5, 18])


def make_runner(folder, kv_cache_dtype="auto", backend=make_backend):
    """All of the cache is NaN but what is written."""
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        block_size=16,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=1 << 20,
        num_threads=1,
    )
    runner = ModelRunner(config, backend=backend)
    with torch.inference_mode():
        for cache in runner.attention.kv_caches:
            for part in cache.tensors:
                part.fill_(torch.nan if part.is_floating_point() else 255)
    return runner


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_greedy_tokens_equal_those_of_transformers(family, tmp_path):
    make_tiny_checkpoint(tmp_path, family)
    runner = make_runner(tmp_path)
    expected = transformers_tokens(tmp_path, PROMPTS, NUM_TOKENS)
    with watch_moves() as moves:
        assert generate(runner, PROMPTS, NUM_TOKENS, blocks=[9, 4, 7, 2]) == expected
    stored = moves.stores(runner.attention.kv_caches[0].numbers)
    # Every token but the last one of each sequence, which nobody asked what follows.
    num_stored = sum(len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS)
    assert stored.sum() == num_stored * stored[0, 0].numel()
    # Chunks of the long prompt beside the others' single tokens.
    assert generate(runner, PROMPTS, NUM_TOKENS, chunk_size=7, blocks=[3, 6, 1, 5]) == expected


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"),
    [("llama", "fp8_e4m3"), ("qwen3", "int8"), ("gemma3_text", "fp8_e5m2")],
)
def test_a_cache_of_8_bits_gives_the_tokens_of_the_reference(family, kv_cache_dtype, tmp_path):
    make_tiny_checkpoint(tmp_path, family)
    ours, reference = (
        make_runner(tmp_path, kv_cache_dtype, backend)
        for backend in (make_backend, ReferenceAttention)
    )
    expected = generate(reference, PROMPTS[1:], NUM_TOKENS, chunk_size=10)
    assert generate(ours, PROMPTS[1:], NUM_TOKENS, chunk_size=10) == expected
