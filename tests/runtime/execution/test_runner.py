from __future__ import annotations

import logging

import pytest

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def make_runner(folder, **flags):
    return ModelRunner(
        EngineConfig(model=str(folder), num_threads=1, kv_cache_memory_bytes=1 << 22, **flags)
    )


@pytest.mark.parametrize(
    ("flags", "reason", "shown"),
    [
        ({"kv_cache_dtype": "fp4"}, "InvalidFlags", "--kv-cache-dtype .* is fp4"),
        ({"dtype": "int8"}, "InvalidFlags", "--dtype .* is int8"),
        ({"device": "tpu"}, "InvalidFlags", "--device is tpu"),
        ({"quantization": "awq"}, "QuantizationMismatch", "--quantization awq"),
        ({"max_model_len": 513}, "InvalidFlags", "Give at most 512"),
    ],
)
def test_what_cannot_be_served_is_refused_by_flag_and_value(folder, flags, reason, shown):
    with pytest.raises(FatalError, match=shown) as caught:
        make_runner(folder, **flags)
    assert caught.value.reason == reason


def test_the_facts_are_those_of_the_model_and_the_cache(folder):
    runner = make_runner(folder, dtype="bfloat16", max_model_len=100)
    facts = runner.ready_facts
    assert (facts.max_model_len, facts.block_size, facts.vocab_size) == (100, 32, 320)
    assert (facts.dtype, facts.device, facts.eos_token_ids) == ("bfloat16", "cpu", [2])
    assert facts.kv_cache_dtype == "bfloat16"
    # A token takes 2 * 3 layers * 2 heads * 16 dimensions * 2 bytes; block 0 is not handed out.
    assert facts.num_blocks == runner.num_blocks == (1 << 22) // (384 * 32) - 1


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2", "int8"])
def test_keys_and_values_of_8_bits_are_a_fact_and_leave_room_for_more_tokens(folder, caplog, name):
    with caplog.at_level(logging.INFO):
        runner = make_runner(folder, dtype="bfloat16", max_model_len=100, kv_cache_dtype=name)
    shown = {"fp8": "fp8_e4m3"}.get(name, name)
    assert runner.ready_facts.kv_cache_dtype == shown
    assert f"of 32 tokens in {shown}" in caplog.text
    # 2 * 3 layers * 2 heads * (16 dimensions of a byte and 4 bytes of a scale).
    assert runner.num_blocks == (1 << 22) // (240 * 32) - 1


def test_progress_goes_through_load_and_warmup(folder):
    seen = []
    config = EngineConfig(model=str(folder), num_threads=1, kv_cache_memory_bytes=1 << 22)
    ModelRunner(config, lambda *report: seen.append(report))
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["load", "warmup"]
    assert seen[-1][:2] == ("warmup", 100.0)


def test_each_phase_is_logged_with_its_seconds(folder, caplog):
    with caplog.at_level(logging.INFO):
        make_runner(folder)
    for line in (
        "instructions",
        "threads",
        "GB/s, so one request gets",
        "Loading the weights took",
        "Warming up took",
    ):
        assert line in caplog.text


def test_a_context_that_was_lowered_is_told(folder, caplog):
    config = EngineConfig(
        model=str(folder), dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 18
    )
    runner = ModelRunner(config)
    assert runner.max_model_len < 512
    assert "--kv-cache-memory-bytes" in caplog.text


def test_rows_that_sample_nothing_return_nothing(folder):
    runner = make_runner(folder)
    sampled = SamplingParams(temperature=0.0)
    rows = [
        ScheduledRow(
            request_id=str(block),
            token_ids=[5] * (3 + block),
            start=0,
            block_table=[block],
            sampling_params=params,
        )
        for block, params in ((1, None), (2, sampled), (3, None))
    ]
    assert [len(output.token_ids) for output in runner.execute(rows)] == [0, 1, 0]
    assert runner.execute(rows[:1])[0].token_ids == []


@pytest.mark.parametrize("is_tied", [False, True])
def test_greedy_tokens_are_the_same_with_logprobs(tmp_path, is_tied):
    folder = make_tiny_checkpoint(tmp_path, tie_word_embeddings=is_tied)
    runner = make_runner(folder, dtype="bfloat16")
    prompts = [[3 + index, 40, 200 - index] for index in range(6)]
    expected = generate(runner, prompts, 40)
    for asked in ({"logprobs": 2}, {"best_of": 2}):
        params = [SamplingParams(temperature=0.0, **asked)] * len(prompts)
        assert generate(runner, prompts, 40, params=params) == expected
