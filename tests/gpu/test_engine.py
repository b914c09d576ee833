from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pagoda_runtime import LLM, SamplingParams
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.testing import TINY
from pagoda_runtime.parallel import connect


def make_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", TINY)
def test_tokens_are_those_of_transformers(family, num_tokens, folders, make_runner):
    prompts = make_prompts([1, 7, 33, 100])
    expected = transformers_tokens(folders(family), prompts, num_tokens)
    assert generate(make_runner(folders(family)), prompts, num_tokens) == expected


def test_tokens_are_the_same_when_prompts_are_cut(num_tokens, folders, make_runner):
    runner, prompts = make_runner(folders("qwen3")), make_prompts([1, 40, 33, 100])
    expected = generate(runner, prompts, num_tokens)
    assert generate(runner, prompts, num_tokens, chunk_size=13) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_graphs_change_no_token(family, dtype, num_tokens, folders, make_runner):
    # Four rows are those of a graph: with others to fill it up, sums may round otherwise.
    prompts = make_prompts([1, 7, 33, 100])
    with_graphs, without = (
        generate(
            make_runner(folders(family), dtype=dtype, enforce_eager=eager), prompts, num_tokens
        )
        for eager in (False, True)
    )
    assert with_graphs == without


def test_bfloat16_follows_float32_closely(folders, make_runner):
    prompts = make_prompts([30] * 8)
    exact, rounded = (
        generate(make_runner(folders("llama"), dtype=dtype, max_num_seqs=8), prompts, 1)
        for dtype in ("float32", "bfloat16")
    )
    assert sum(a == b for a, b in zip(exact, rounded, strict=True)) >= 6


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("kv_cache_dtype", "fp8_e4m3"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", "int8"),
        ("quantization", "int8"),
        ("quantization", "int4"),
    ],
)
def test_numbers_of_few_bits_give_the_tokens_that_a_cpu_gives(
    flag, value, num_tokens, folders, make_runner
):
    prompts = make_prompts([30] * 8, seed=1)
    settings = {flag: value, "max_num_seqs": 8}
    ours = generate(make_runner(folders("qwen3"), **settings), prompts, num_tokens)
    config = EngineConfig(
        model=str(folders("qwen3")),
        device="cpu",
        dtype="float32",
        kv_cache_memory_bytes=1 << 24,
        max_model_len=256,
        **settings,
    )
    expected = generate(ModelRunner(config), prompts, num_tokens)
    # A number between two of 8 bits may go either way.
    assert sum(a[:4] == b[:4] for a, b in zip(ours, expected, strict=True)) >= 6


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_two_ranks_on_one_device_give_the_tokens_of_one(
    family, platform, backend, num_tokens, folders, make_runner, tmp_path
):
    folder, prompts = folders(family), make_prompts([1, 7, 33])
    expected = generate(make_runner(folder), prompts, num_tokens)
    config = EngineConfig(
        model=str(folder),
        device=platform.name,
        dtype="float32",
        kv_cache_memory_bytes=1 << 24,
        block_size=16,
        max_model_len=256,
        max_num_seqs=4,
        num_threads=1,
        tensor_parallel_size=2,
        # Gloo sends from the host, and no graph records that.
        enforce_eager=True,
    )

    def run(rank):
        device = platform.device(rank)
        parallel = connect(rank, 2, str(tmp_path), device, backend="gloo")
        runner = ModelRunner(config, no_progress, parallel, platform, backend)
        return generate(runner, prompts, num_tokens)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == [expected, expected]


def test_an_engine_process_answers_many_requests_at_once(platform, num_tokens, folders):
    """Steps are planned ahead there, with tokens that the device has not yet told."""
    folder, prompts = folders("qwen3"), make_prompts([1, 7, 33, 60]) * 4
    expected = transformers_tokens(folder, prompts[:4], num_tokens)
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    drawn = SamplingParams(
        temperature=1.0, top_p=0.9, seed=1, n=2, max_tokens=num_tokens, ignore_eos=True, logprobs=2
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    with LLM(
        str(folder),
        device=platform.name,
        dtype="float32",
        kv_cache_memory_bytes=1 << 24,
        max_model_len=256,
        max_num_seqs=4,
    ) as llm:
        outputs = llm.generate(inputs, [greedy, drawn] * 8, use_tqdm=False)
        again = llm.generate(inputs, [greedy, drawn] * 8, use_tqdm=False)
    tokens = [[choice.token_ids for choice in output.outputs] for output in outputs]
    assert tokens == [[choice.token_ids for choice in output.outputs] for output in again]
    assert [list(of_greedy[0]) for of_greedy in tokens[::2]] == expected[::2] * 4
    assert all(len(choice) == num_tokens for choices in tokens for choice in choices)
    assert all(len(choices) == 2 for choices in tokens[1::2])
