"""Ranks in real processes, with runners that have no model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.ranks import Ranks
from pagoda_runtime.errors import EngineDead, FatalError
from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.health import find_problem
from pagoda_runtime.server.testing import make_config, make_state
from pagoda_runtime.testing import fake_next_token

COMMAND = (sys.executable, "-m", "pagoda_runtime.testing")
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
# Until all ranks are: runners without a model do not wait for each other.
IDLE_SECONDS = 0.5
# More than any machine takes to start a rank, and to end one.
START_SECONDS = 60.0
END_SECONDS = 30.0
LONG = {"step_seconds": 0.01, "max_model_len": 4000, "num_blocks": 2000}


def start(options: dict[str, object], size: int = 3, **flags: object) -> EngineClient:
    model = "fake:" + json.dumps(options)
    config = EngineConfig(model=model, tensor_parallel_size=size, **flags)
    return EngineClient(config, command=COMMAND)


def ranks_of(engine: EngineClient) -> list[int]:
    """The pids of the other ranks' processes, in the order in which they were started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == engine.pid:
            found.append(int(folder.name))
    return sorted(found)


async def until(holds: Callable[[], bool], seconds: float = END_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@asynccontextmanager
async def serving(
    options: dict[str, object] = LONG, **flags: object
) -> AsyncIterator[tuple[EngineClient, list[int]]]:
    """An engine and its other ranks, of which none is left in the end."""
    engine = start(options, **flags)
    ranks: list[int] = []
    try:
        await engine.wait_ready()
        ranks = ranks_of(engine)
        assert len(ranks) == engine.config.tensor_parallel_size - 1
        yield engine, ranks
    finally:
        await engine.shutdown()
        await until(lambda: not any(map(is_alive, ranks)))


async def generate(engine: EngineClient, prompt: list[int], params: SamplingParams) -> list[int]:
    stream = engine.generate(engine.make_request(str(prompt), prompt, params))
    return [token for delta in [d async for d in stream] for token in delta.new_token_ids]


@pytest.mark.parametrize("overlap", [False, True])
async def test_every_rank_executes_every_step(overlap):
    """A rank that missed a step, or got another, would read slots that nobody wrote."""
    async with serving({}, async_scheduling=overlap) as (engine, _):
        prompts = [[number, 7, 9] for number in range(8)]
        found = await asyncio.gather(*(generate(engine, prompt, GREEDY) for prompt in prompts))
        for prompt, tokens in zip(prompts, found, strict=True):
            for number, token in enumerate(tokens):
                so_far = [*prompt, *tokens[:number]]
                assert token == fake_next_token(so_far, GREEDY, 0, engine.ready.vocab_size)
        assert engine.failure is None


async def fail_midway(engine: EngineClient, act: Callable[[], None]) -> tuple[str, float]:
    """Act while a request runs; what its stream ends with, and after how many seconds."""
    stream = engine.generate(engine.make_request("r", [1, 2], ENDLESS))
    await anext(stream)
    act()
    started = time.monotonic()
    with pytest.raises(EngineDead) as caught:
        async for _ in stream:
            pass
    return str(caught.value), time.monotonic() - started


async def test_a_killed_rank_ends_the_engine_with_its_name_and_step():
    async with serving() as (engine, ranks):
        message, seconds = await fail_midway(engine, lambda: os.kill(ranks[1], signal.SIGKILL))
        assert engine.failure.reason == "RankDied"
        assert message.startswith("Rank 2 of 3 ")
        assert "killed by signal 9 (SIGKILL) in step " in message
        assert seconds < END_SECONDS


async def test_a_stopped_rank_ends_the_engine_after_the_timeout():
    async with serving(collective_timeout_seconds=1.0) as (engine, ranks):
        message, seconds = await fail_midway(engine, lambda: os.kill(ranks[0], signal.SIGSTOP))
        assert engine.failure.reason == "RankDied"
        assert message.startswith("Rank 1 of 3 ")
        assert "did not answer for 1 s (--collective-timeout-seconds) in step " in message
        assert "its process is stopped" in message
        assert 0.9 < seconds < END_SECONDS


async def test_ranks_that_were_stopped_together_go_on_together():
    async with serving(collective_timeout_seconds=1.0) as (engine, ranks):
        stream = engine.generate(engine.make_request("r", [1, 2], ENDLESS))
        await anext(stream)
        for pid in (engine.pid, *ranks):
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(2.0)
        os.kill(engine.pid, signal.SIGCONT)
        await asyncio.sleep(0.3)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        for _ in range(3):
            await anext(stream)
        await asyncio.sleep(1.2)
        assert engine.failure is None


async def test_a_rank_that_is_stopped_while_idle_is_missed_at_the_next_step():
    async with serving(collective_timeout_seconds=1.5) as (engine, ranks):
        await generate(engine, [1], GREEDY)
        await asyncio.sleep(IDLE_SECONDS)
        os.kill(ranks[1], signal.SIGSTOP)
        await asyncio.sleep(1.8)
        assert engine.failure is None
        message, _ = await fail_midway(engine, lambda: None)
        assert message.startswith("Rank 2 of 3 ")


async def test_a_rank_that_dies_while_the_engine_is_idle_is_noticed_at_once():
    async with serving() as (engine, ranks):
        await generate(engine, [1], GREEDY)
        await asyncio.sleep(IDLE_SECONDS)
        os.kill(ranks[0], signal.SIGKILL)
        await until(lambda: engine.failure is not None)
        assert "Rank 1 of 3" in engine.failure.message
        assert "(SIGKILL) after step 20" in engine.failure.message


async def test_a_rank_that_dies_while_it_loads_is_told():
    engine = start({"rank_2": {"load_seconds": 60}})
    try:
        await until(lambda: len(ranks_of(engine)) == 2, START_SECONDS)
        os.kill(ranks_of(engine)[1], signal.SIGKILL)
        with pytest.raises(FatalError, match=r"Rank 2 .* \(SIGKILL\) while it loaded the model"):
            await asyncio.wait_for(engine.wait_ready(), END_SECONDS)
    finally:
        await engine.shutdown()


async def test_a_rank_that_is_stopped_while_it_loads_is_told_and_a_slow_one_is_waited_for():
    engine = start({"rank_1": {"load_seconds": 1}}, collective_timeout_seconds=0.3)
    try:
        await asyncio.wait_for(engine.wait_ready(), START_SECONDS)
    finally:
        await engine.shutdown()
    engine = start({"rank_2": {"load_seconds": 60}}, collective_timeout_seconds=0.3)
    try:
        await until(lambda: len(ranks_of(engine)) == 2, START_SECONDS)
        os.kill(ranks_of(engine)[1], signal.SIGSTOP)
        with pytest.raises(FatalError, match=r"Rank 2 .* while it loaded the model: its process"):
            await asyncio.wait_for(engine.wait_ready(), END_SECONDS)
    finally:
        await engine.shutdown()


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"fail": ["DoesNotFit", "Too large."]}, "DoesNotFit", "^Too large.$"),
        ({"crash": True}, "RankDied", "^Rank 1 failed with ValueError: crashed as told"),
    ],
)
async def test_what_a_rank_fails_with_is_what_the_engine_says(options, reason, words):
    engine = start({"load_seconds": 1, "rank_1": {"load_seconds": 0, **options}})
    try:
        with pytest.raises(FatalError, match=words) as caught:
            await asyncio.wait_for(engine.wait_ready(), START_SECONDS)
        assert caught.value.reason == reason
    finally:
        await engine.shutdown()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("os.write(0, b'\\0\\0\\0\\1\\xc1')", r"^The watch of the ranks failed with "),
        ("os.close(0)", r"^Rank 1 of 2 .* broke off while it loaded the model, and does not end"),
    ],
)
def test_a_rank_that_does_what_none_should_ends_the_engine(tmp_path, act, words):
    """A process that dies closes its files first; to take down a GPU's context takes it longer."""
    ended: list[EngineFailed] = []
    num_files = len(os.listdir("/proc/self/fd"))
    config = EngineConfig(model="m", tensor_parallel_size=2)
    command = [sys.executable, "-c", f"import os, time; {act}; time.sleep(60)"]
    ranks = Ranks(config, str(tmp_path), "error", command=command, end=ended.append)
    ranks.await_verdict()
    ranks.close()
    assert re.search(words, ended[0].message)
    assert len(os.listdir("/proc/self/fd")) == num_files


@pytest.mark.parametrize("overlap", [False, True])
async def test_a_shutdown_in_the_middle_of_a_step_ends_all_ranks_without_a_word(overlap, capfd):
    async with serving(LONG | {"step_seconds": 0.3}, async_scheduling=overlap) as (engine, _):
        stream = engine.generate(engine.make_request("r", [1, 2], ENDLESS))
        await anext(stream)
    assert engine.failure is None
    assert "rror" not in capfd.readouterr().err


async def test_a_stopped_rank_0_shows_in_health():
    async with serving(stall_seconds=0.5) as (engine, _):
        stream = engine.generate(engine.make_request("r", [1, 2], ENDLESS))
        await anext(stream)
        state = make_state(engine, make_config("--stall-seconds", "0.5"))
        assert find_problem(state, engine.last_step_seconds + 0.4) is None
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(1.0)
        assert "--stall-seconds 0.5" in (find_problem(state, time.monotonic()) or "")
        os.kill(engine.pid, signal.SIGCONT)


async def test_no_rank_outlives_rank_0_even_if_it_is_stopped():
    async with serving() as (engine, ranks):
        os.kill(ranks[0], signal.SIGSTOP)
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: not any(map(is_alive, ranks)))


async def test_idle_ranks_take_no_time():
    async with serving() as (engine, ranks):
        await generate(engine, [1], GREEDY)
        await asyncio.sleep(IDLE_SECONDS)
        before = [cpu_ticks(pid) for pid in (engine.pid, *ranks)]
        await asyncio.sleep(1.5)
        after = [cpu_ticks(pid) for pid in (engine.pid, *ranks)]
        assert all(now - then <= 1 for now, then in zip(after, before, strict=True))


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
