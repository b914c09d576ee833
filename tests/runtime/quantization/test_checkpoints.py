"""Whole quantized checkpoints, against the same weights in fp32."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pagoda_kernels.cpu import panels
from pagoda_runtime.execution.testing import generate_with_logits, transformers_tokens
from pagoda_runtime.parallel import connect

PROMPTS = [[5, 9, 100, 7, 42], list(range(40, 70))]


def run(runner):
    return generate_with_logits(runner, PROMPTS, 4)


def assert_alike(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=2e-3, rtol=1e-3)


def test_the_logits_are_those_of_the_same_weights_in_fp32(pair, kind, make_runner):
    quantized, oracle = pair(kind)
    expected = run(make_runner(oracle))
    assert expected[0] == transformers_tokens(oracle, PROMPTS, 4)
    assert_alike(run(make_runner(quantized)), expected)


def test_two_ranks_have_the_logits_of_one(pair, kind, make_runner, tmp_path):
    quantized, oracle = pair(kind)

    def run_rank(rank):
        parallel = connect(rank, 2, str(tmp_path), torch.device("cpu"), backend="gloo")
        return run(make_runner(quantized, parallel, tensor_parallel_size=2))

    expected = run(make_runner(oracle))
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(run_rank, range(2)):
            assert_alike(found, expected)


def test_what_runs_is_reported_and_what_a_step_reads_is_logged(pair, make_runner, caplog):
    with caplog.at_level(logging.INFO):
        facts = make_runner(pair("awq")[0], kv_cache_dtype="fp8").ready_facts
    assert (facts.architecture, facts.quantization) == ("LlamaForCausalLM", "awq")
    assert facts.kv_cache_dtype == "fp8_e4m3"
    assert "Quantized by awq: a step reads" in caplog.text


def test_a_quantized_vocabulary_is_used_though_the_config_says_that_it_is_tied(
    pair, rewritten, make_runner
):
    folder = rewritten("exl2", config=lambda values: values.update(tie_word_embeddings=True))
    assert_alike(run(make_runner(folder)), run(make_runner(pair("exl2")[1])))


@pytest.mark.skipif(
    not panels.has_panels(panels.INT8), reason="this processor widens matrices in any dtype"
)
@pytest.mark.parametrize(("flag", "expected"), [("auto", "bfloat16"), ("float16", "float16")])
def test_what_says_float16_computes_in_what_a_cpu_has_products_for(
    rewritten, make_runner, caplog, flag, expected
):
    folder = rewritten("awq", config=lambda values: values.update(dtype="float16"))
    with caplog.at_level(logging.INFO):
        assert make_runner(folder, dtype=flag).ready_facts.dtype == expected
    assert ("instead of float16" in caplog.text) == (flag == "auto")
