"""The prompts, lengths and arrivals of each workload."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from pagoda_runtime.bench.workloads import add_workload_flags, make_requests
from pagoda_runtime.bench.workloads.base import BenchRequest, render_words
from pagoda_runtime.errors import RequestError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def make(*argv: str, seed: int = 0, vocab_size: int = 1000) -> list[BenchRequest]:
    parser = argparse.ArgumentParser()
    add_workload_flags(parser, num_prompts=20)
    return make_requests(parser.parse_args(argv), vocab_size, random.Random(seed))


def write_trace(folder: Path, text: str, name: str = "trace.csv") -> tuple[str, ...]:
    (folder / name).write_text(text)
    return ("--dataset-name", "trace-file", "--dataset-path", str(folder / name))


def test_random_prompts_have_the_lengths_asked_for():
    requests = make("--random-input-len", "30", "--random-output-len", "7")
    assert [len(r.prompt_token_ids) for r in requests] == [30] * 20
    assert [r.output_len for r in requests] == [7] * 20
    assert all(100 <= token < 1000 for r in requests for token in r.prompt_token_ids)


def test_a_range_ratio_spreads_lengths_around_the_mean():
    requests = make("--input-len", "100", "--random-range-ratio", "0.5", "--num-prompts", "500")
    lengths = [len(r.prompt_token_ids) for r in requests]
    assert (min(lengths), max(lengths)) == (50, 150)


def test_equal_seeds_give_equal_requests_and_others_do_not():
    assert make(seed=1) == make(seed=1)
    assert make(seed=1) != make(seed=2)


def test_token_ids_stay_in_a_tiny_vocabulary():
    requests = make(vocab_size=10)
    assert {t for r in requests for t in r.prompt_token_ids} == {5, 6, 7, 8, 9}


def test_shared_prefixes_are_used_in_turn():
    flags = ("--prefix-len", "8", "--suffix-len", "4", "--num-prefixes", "3")
    prompts = [r.prompt_token_ids for r in make("--dataset-name", "shared-prefix", *flags)]
    assert {len(prompt) for prompt in prompts} == {12}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 3
    assert prompts[0][:8] == prompts[3][:8]
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 20


def test_a_text_keeps_what_prompts_share():
    words = render_words([100, 200, 300]).split()
    assert len(words) == 3
    assert render_words([100, 200, 301]).split()[:2] == words[:2]


def test_an_azure_trace_is_read_as_it_is_published(tmp_path):
    first, second = make(*write_trace(tmp_path, AZURE))
    assert (len(first.prompt_token_ids), first.output_len) == (374, 44)
    assert (len(second.prompt_token_ids), second.output_len) == (396, 109)
    assert first.arrival_seconds == 0.0
    assert second.arrival_seconds == pytest.approx(4.314579, abs=1e-5)


def test_a_trace_is_replayed_faster(tmp_path):
    _, second = make(*write_trace(tmp_path, AZURE), "--trace-speed", "10")
    assert second.arrival_seconds == pytest.approx(0.4314579, abs=1e-5)


def test_only_the_first_rows_of_a_trace_are_used(tmp_path):
    assert len(make(*write_trace(tmp_path, AZURE), "--num-prompts", "1")) == 1


def test_hash_ids_of_a_mooncake_trace_become_shared_tokens(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    first, second = make(*write_trace(tmp_path, text, "trace.jsonl"))
    assert second.arrival_seconds == 3.0
    assert (len(first.prompt_token_ids), len(second.prompt_token_ids)) == (600, 700)
    assert first.prompt_token_ids[:512] == second.prompt_token_ids[:512]
    assert first.prompt_token_ids[512:600] != second.prompt_token_ids[512:600]


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("t.csv", "2023-11-16 18:15:46,x,44", ["line 2", "ContextTokens is 'x'", "whole number"]),
        ("t.csv", "2023-11-16 18:15:46,0,44", ["ContextTokens is '0'", "1–10000000"]),
        ("t.csv", "yesterday,5,44", ["TIMESTAMP is 'yesterday'", "2023-11-16"]),
        ("t.csv", "2023-11-16 18:15:46,5", ["output_tokens, output_length, GeneratedTokens"]),
        ("t.jsonl", "{", ["line 1", "no JSON object"]),
        ("t.jsonl", "[1]", ["'[1]' is no JSON object"]),
        ("t.jsonl", '{"timestamp": -1}', ["timestamp is -1", "milliseconds, 0 or more"]),
        ("t.jsonl", '{"timestamp": 1, "input_length": 1.5}', ["input_length is 1.5"]),
        ("t.jsonl", '{"timestamp": 1, "hash_ids": 3}', ["hash_ids is 3", "list of integers"]),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_what_belongs_there(
    tmp_path, name, line, expected
):
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n" if name.endswith("csv") else ""
    with pytest.raises(RequestError) as error:
        make(*write_trace(tmp_path, header + line + "\n", name))
    for part in [*expected, str(tmp_path / name), "Correct or remove the line"]:
        assert part in error.value.message


@pytest.mark.parametrize("text", ["", "TIMESTAMP,ContextTokens,GeneratedTokens\n"])
def test_an_empty_trace_is_refused(tmp_path, text):
    with pytest.raises(RequestError, match="holds no requests"):
        make(*write_trace(tmp_path, text))


def test_a_missing_trace_is_refused(tmp_path):
    flags = ("--dataset-name", "trace-file")
    with pytest.raises(RequestError, match="needs --dataset-path"):
        make(*flags)
    with pytest.raises(RequestError, match=r"cannot be read: .*No such file"):
        make(*flags, "--dataset-path", str(tmp_path / "none.csv"))
