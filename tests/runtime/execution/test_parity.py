"""Greedy tokens equal transformers' in fp32, on tiny random checkpoints of every family."""

from __future__ import annotations

import random

import pytest
import torch

from pagoda_kernels.cpu.panels import INT8, has_panels
from pagoda_kernels.paged_attention import make_backend
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.testing import TINY, make_tiny_checkpoint
from pagoda_runtime.quantization.config import ONLINE
from pagoda_runtime.quantization.rounded import RoundedMethod
from pagoda_runtime.sampling_params import SamplingParams

NUM_TOKENS = 24
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
VARIANTS = {
    **{family: (family, {}) for family in TINY},
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2 with a window in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma3 with linear rope in its global layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {**LINEAR_ROPE, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        },
    ),
}


def make_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


def make_runner(folder, backend=make_backend, **settings):
    config = EngineConfig(
        model=str(folder),
        **{
            "dtype": "float32",
            "block_size": 8,
            "kv_cache_memory_bytes": 1 << 24,
            "num_threads": 1,
            **settings,
        },
    )
    return ModelRunner(config, backend=backend)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_those_of_transformers(variant, tmp_path):
    family, settings = VARIANTS[variant]
    make_tiny_checkpoint(tmp_path, family, **settings)
    prompts = make_prompts([1, 7, 33])
    runner = make_runner(tmp_path)
    # Blocks in random order, and all of the cache NaN but what is written.
    with torch.inference_mode():
        for cache in runner.attention.kv_caches:
            cache.numbers.fill_(torch.nan)
    blocks = random.Random(1).sample(range(1, runner.num_blocks + 1), 40)
    expected = transformers_tokens(tmp_path, prompts, NUM_TOKENS)
    assert generate(runner, prompts, NUM_TOKENS, blocks=blocks) == expected


@pytest.mark.parametrize("family", TINY)
def test_chunks_of_a_prompt_give_the_same_tokens_as_the_whole(family, tmp_path):
    make_tiny_checkpoint(tmp_path, family)
    runner = make_runner(tmp_path)
    prompts = make_prompts([45, 3, 20])
    whole = generate(runner, prompts, NUM_TOKENS)
    assert generate(runner, prompts, NUM_TOKENS, chunk_size=7) == whole
    assert generate(runner, prompts, NUM_TOKENS, chunk_size=1) == whole


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2", "int8"])
def test_keys_and_values_of_8_bits_give_what_the_specification_gives(
    family, kv_cache_dtype, tmp_path
):
    make_tiny_checkpoint(tmp_path, family)
    prompts = make_prompts([45, 3, 20])
    found = {
        backend: generate(
            make_runner(tmp_path, backend, kv_cache_dtype=kv_cache_dtype), prompts, NUM_TOKENS
        )
        for backend in (make_backend, ReferenceAttention)
    }
    assert found[make_backend] == found[ReferenceAttention]


def test_a_request_has_the_same_tokens_alone_and_in_a_batch_of_16(llama):
    runner = make_runner(llama)
    prompts = make_prompts(range(2, 50, 3))
    together = generate(runner, prompts, NUM_TOKENS)
    assert together == [generate(runner, [prompt], NUM_TOKENS)[0] for prompt in prompts]


def test_sampled_tokens_do_not_depend_on_the_batch(llama):
    runner = make_runner(llama)
    prompts = make_prompts([5, 9, 30, 2])
    params = [
        SamplingParams(temperature=1.5, seed=1),
        SamplingParams(temperature=0.8, top_k=20, seed=2),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3),
        SamplingParams(temperature=0.0),
    ]
    together = generate(runner, prompts, NUM_TOKENS, params=params)
    alone = [
        generate(runner, [prompt], NUM_TOKENS, params=[param])[0]
        for prompt, param in zip(prompts, params, strict=True)
    ]
    assert together == alone
    other_seed = [SamplingParams(temperature=1.5, seed=7)]
    assert generate(runner, prompts[:1], NUM_TOKENS, params=other_seed)[0] != alone[0]


@pytest.mark.skipif(not has_panels(INT8), reason="this processor has no product of bytes")
def test_a_greedy_request_has_the_same_tokens_among_sampled_ones_in_bfloat16(tmp_path):
    make_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    runner = make_runner(tmp_path, dtype="bfloat16")
    assert runner.model.lm_head.argmax
    prompts = make_prompts([9, 9, 9, 9])
    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=1)
    expected = generate(runner, prompts, NUM_TOKENS)
    mixed = generate(runner, prompts, NUM_TOKENS, params=[greedy, drawn, greedy, drawn])
    assert mixed[0] == expected[0]
    assert mixed[2] == expected[2]


@pytest.mark.parametrize("quantization", ONLINE)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_rounded_weights_follow_the_checkpoint_closely(tmp_path, family, quantization):
    folder = make_tiny_checkpoint(tmp_path, family)
    exact = make_runner(folder)
    rounded = make_runner(folder, dtype="bfloat16", quantization=quantization)
    for layer in rounded.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
            # int4 spares the values' matrix, which is a product of its own.
            assert all(isinstance(member, RoundedMethod) for member in linear.method.members)
    prompts = make_prompts([30] * 8)
    pairs = zip(generate(exact, prompts, 1), generate(rounded, prompts, 1), strict=True)
    assert sum(a == b for a, b in pairs) >= {"int8": 6, "fp8": 4, "int4": 3}[quantization]


def test_bfloat16_follows_float32_closely(llama):
    exact = make_runner(llama)
    rounded = make_runner(llama, dtype="bfloat16")
    prompts = make_prompts([30] * 8)
    pairs = zip(generate(exact, prompts, 1), generate(rounded, prompts, 1), strict=True)
    assert sum(a == b for a, b in pairs) >= 6


@pytest.mark.gpu
@pytest.mark.parametrize("family", TINY)
def test_a_gpu_gives_the_tokens_of_the_cpu(family, tmp_path):
    make_tiny_checkpoint(tmp_path, family)
    prompts = make_prompts([1, 7, 33])
    expected = generate(make_runner(tmp_path, device="cpu"), prompts, NUM_TOKENS)
    assert generate(make_runner(tmp_path, device="cuda"), prompts, NUM_TOKENS) == expected
