"""`pagoda bench latency` and `throughput` on a tiny random checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda_runtime import LLM, bench
from pagoda_runtime.bench.offline import (
    format_latency,
    format_throughput,
    measure_latency,
    measure_throughput,
    start_llm,
)
from pagoda_runtime.cli import main
from pagoda_runtime.errors import RequestError
from pagoda_runtime.models.testing import make_tiny_checkpoint

FLAGS = ("--dtype", "float32", "--device", "cpu", "--num-threads", "1", "--input-len", "8")
FLAGS += ("--kv-cache-memory-bytes", str(2**22), "--output-len", "4")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with start_llm(parse("throughput", folder, *FLAGS)) as llm:
        yield llm


def test_latency_reports_the_rounds(llm):
    flags = ("--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "3")
    result = measure_latency(llm, parse("latency", *FLAGS, *flags))
    assert len(result["latencies"]) == 3
    assert min(result["latencies"]) <= result["avg_latency"] <= max(result["latencies"])
    assert result["percentiles"]["50"] == sorted(result["latencies"])[1]
    assert "3 rounds" in format_latency(result)


def test_throughput_counts_all_tokens(llm):
    result = measure_throughput(llm, parse("throughput", *FLAGS, "--num-prompts", "5"))
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (40, 20)
    assert result["tokens_per_second"] == pytest.approx(60 / result["elapsed_time"])
    assert "5 requests" in format_throughput(result)


def test_a_prompt_that_does_not_fit_is_an_error(llm):
    with pytest.raises(RequestError, match="5000"):
        measure_throughput(llm, parse("throughput", *FLAGS, "--input-len", "5000"))


def test_latency_runs_without_the_prefix_cache():
    assert not parse("latency", "m").enable_prefix_caching
    assert parse("throughput", "m").enable_prefix_caching


@pytest.mark.parametrize("models", [(), ("a", "--model", "b")])
def test_one_model_is_needed(models, capsys):
    assert main(["bench", "latency", *models]) == 2
    assert "give one: pagoda bench latency MODEL" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_its_figures(folder: str, tmp_path: Path, capsys):
    path = tmp_path / "latency.json"
    flags = ("--num-iters-warmup", "0", "--num-iters", "1", "--output-json", str(path))
    assert main(["bench", "latency", folder, *FLAGS, *flags]) == 0
    assert json.loads(path.read_text())["model"] == folder
    assert "8 requests at once" in capsys.readouterr().out
