"""Two ranks as users start them: real processes, a real model, gloo."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda_runtime.client.llm import LLM
from pagoda_runtime.errors import EngineDead
from pagoda_runtime.grammar.forms import regex_grammar
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

GRAMMAR = SamplingParams(
    temperature=1.0, n=3, seed=1, max_tokens=40, grammar=regex_grammar("[a-f]{9}(1|22)")
)
PROMPTS = ["Hello", "The quick brown fox", "a"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def start(folder: Path, size: int = 2, **flags: object) -> LLM:
    values = {"dtype": "float32", "device": "cpu", "kv_cache_memory_bytes": 1 << 22} | flags
    return LLM(str(folder), tensor_parallel_size=size, **values)


def ranks_of(llm: LLM) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == llm._client.pid:
            yield int(folder.name)


def signal_midway(llm: LLM, number: signal.Signals) -> tuple[str, float]:
    """Send it to rank 1 while requests run; the error they end with, and after how many seconds."""
    (rank,) = ranks_of(llm)
    sent = []

    def send() -> None:
        while not llm._client.stats.running:
            time.sleep(0.01)
        os.kill(rank, number)
        sent.append(time.monotonic())

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(EngineDead) as caught:
        llm.generate(PROMPTS * 20, ENDLESS, use_tqdm=False)
    ended = time.monotonic()
    sender.join()
    llm.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)
    return str(caught.value), ended - sent[0]


def test_two_processes_give_the_tokens_of_one_until_one_of_them_is_killed(folder):
    one, two = start(folder, 1), start(folder)
    assert two.facts.tensor_parallel_size == 2
    params = [GREEDY, GREEDY, GRAMMAR]
    expected = one.generate(PROMPTS, params, use_tqdm=False)
    one.shutdown()
    found = two.generate(PROMPTS, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert [o.text for o in found[2].outputs] == [o.text for o in expected[2].outputs]
    assert all(re.fullmatch("[a-f]{9}(1|22)", o.text) for o in found[2].outputs)
    message, seconds = signal_midway(two, signal.SIGKILL)
    assert "Rank 1 of 2" in message
    assert "killed by signal 9 (SIGKILL) in step " in message
    assert seconds < 10


def test_a_stopped_process_ends_the_engine_after_the_timeout(folder):
    message, seconds = signal_midway(start(folder, collective_timeout_seconds=2.0), signal.SIGSTOP)
    assert "Rank 1 of 2" in message
    assert "did not answer for 2 s (--collective-timeout-seconds) in step " in message
    assert 1.9 < seconds < 10
