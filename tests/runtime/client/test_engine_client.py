"""The client with a real engine process on the fake runner."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.client.stream import RequestStream
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import (
    EngineDead,
    FatalError,
    PagodaError,
    PromptTooLong,
    QueueFull,
    RequestError,
)
from pagoda_runtime.ipc.messages import Launch
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import fake_next_token

COMMAND = (sys.executable, "-m", "pagoda_runtime.testing")
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
# More than any machine takes for the end of a process.
END_SECONDS = 30.0
SLOW = {"step_seconds": 0.01, "max_model_len": 2000, "num_blocks": 1000}


def fake_config(options: dict[str, object], **fields: object) -> EngineConfig:
    return EngineConfig(model="fake:" + json.dumps(options), **fields)


@asynccontextmanager
async def engine(
    options: dict[str, object] | None = None, **fields: object
) -> AsyncIterator[EngineClient]:
    client = EngineClient(fake_config(options or {}, **fields), command=COMMAND)
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.shutdown()


def generate(client: EngineClient, *values: Any) -> RequestStream:
    return client.generate(client.make_request(*values))


async def collect(client: EngineClient, request_id: str, prompt: list[int]) -> list[int]:
    return [
        token
        async for delta in generate(client, request_id, prompt, GREEDY)
        for token in delta.new_token_ids
    ]


def unbatched(prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(20):
        tokens.append(fake_next_token(tokens, GREEDY, 0, 100))
    return tokens[len(prompt) :]


async def wait_until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_many_requests_share_the_slots_and_each_gets_its_own_tokens():
    async with engine(max_num_seqs=4) as client:
        prompts = [[i, i + 1] for i in range(12)]
        outputs = await asyncio.gather(
            *(collect(client, f"r{i}", prompt) for i, prompt in enumerate(prompts))
        )
        assert outputs == [unbatched(prompt) for prompt in prompts]
        assert client.stats.finished_total == 12
        assert (client.stats.running, client.stats.waiting, client.stats.slots) == (0, 0, 4)


async def test_progress_and_facts_arrive_before_the_first_request():
    async with engine({"max_model_len": 77}) as client:
        assert (client.progress.phase, client.progress.percent) == ("load", 50.0)
        assert client.ready is not None
        assert client.ready.max_model_len == 77


async def test_a_stream_closed_midway_frees_its_blocks_within_one_step():
    async with engine(SLOW) as client:
        outputs = []
        stream = generate(client, "r", [1, 2], ENDLESS)
        await anext(stream)
        client.on_stats = outputs.append
        await stream.aclose()
        await wait_until(lambda: client.stats.kv_usage == 0.0)
        # One step may have been under way when the stream was closed.
        assert len(outputs) <= 2
        assert client.stats.running == 0


async def test_cancelling_the_reader_aborts_the_request_even_if_the_stream_is_kept():
    async with engine(SLOW) as client:
        stream = generate(client, "r", [1] * 1000, ENDLESS)
        await anext(stream)

        async def read() -> None:
            async for _ in stream:
                pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        reader.cancel()
        await wait_until(lambda: client.stats.kv_usage == 0.0)
        assert [delta async for delta in stream] == []


async def test_the_choices_of_a_request_come_in_one_stream_and_count_as_running():
    params = SamplingParams(n=3, max_tokens=200, ignore_eos=True, seed=1)
    async with engine(SLOW, max_num_seqs=4) as client:
        stream = generate(client, "r", [1, 2], params)
        waiting = generate(client, "next", [1, 2], params)
        assert (client.stats.running, client.stats.waiting) == (0, 2)
        seen = {(await anext(stream)).index for _ in range(6)}
        assert seen == {0, 1, 2}
        assert (client.stats.running, client.stats.waiting) == (3, 1)
        assert client.num_open == 2
        await waiting.aclose()
        await stream.aclose()


async def test_a_finished_choice_gives_its_blocks_back_while_the_others_run_on():
    params = SamplingParams(n=2, max_tokens=60, ignore_eos=True, seed=1)
    async with engine(SLOW) as client:
        stream = generate(client, "r", [1, 2], params)
        await anext(stream)
        stream.finish(1)
        await wait_until(lambda: client.stats.running == 1)
        deltas = [delta async for delta in stream]
        assert {delta.index for delta in deltas} == {0}
        assert deltas[-1].finish_reason == "length"
        await wait_until(lambda: client.stats.kv_usage == 0.0)


async def test_the_end_of_the_last_choice_here_is_the_end_of_the_request_there():
    params = SamplingParams(n=2, max_tokens=None, ignore_eos=True, seed=1)
    async with engine(SLOW) as client:
        stream = generate(client, "r", [1, 2], params)
        await anext(stream)
        for index in range(2):
            stream.finish(index)
        assert client.num_open == 0
        await wait_until(lambda: client.stats.kv_usage == 0.0)


async def test_a_reset_prefix_cache_is_empty_and_says_what_it_held():
    async with engine({"block_size": 4}) as client:
        await collect(client, "first", [1] * 9)
        assert await client.reset_prefix_cache() > 2
        assert await client.reset_prefix_cache() == 0
        delta = await anext(generate(client, "second", [1] * 9, GREEDY))
        assert delta.num_cached_tokens == 0


async def test_who_waits_for_a_reset_hears_of_the_engine_s_death():
    async with engine() as client:
        os.kill(client.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(client.reset_prefix_cache())
        await asyncio.sleep(0.05)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="killed by signal 9"):
            await waiting


async def test_a_stream_that_is_dropped_unread_aborts_the_request():
    async with engine(SLOW) as client:
        generate(client, "r", [1], ENDLESS)
        await wait_until(lambda: client.stats.running + client.stats.waiting == 0)
        await wait_until(lambda: client.stats.finished_total == 1)


async def test_deltas_that_pile_up_become_one():
    async with engine() as client:
        stream = generate(client, "r", [1, 2], GREEDY)
        await wait_until(lambda: client.stats.finished_total == 1)
        deltas = [delta async for delta in stream]
        assert [delta.new_token_ids for delta in deltas] == [unbatched([1, 2])]
        assert deltas[0].finish_reason == "length"
        assert deltas[0].queue_seconds is not None


async def test_requests_that_cannot_be_served_are_refused_at_once():
    async with engine({"num_blocks": 5, "block_size": 4, "max_model_len": 30}) as client:
        with pytest.raises(PromptTooLong, match="30 tokens; with max_model_len 30 at most 29"):
            generate(client, "r", [1] * 30, GREEDY)
        with pytest.raises(PromptTooLong, match="20 tokens; the KV cache holds 20"):
            generate(client, "r", [1] * 20, SamplingParams(max_tokens=1))
        with pytest.raises(PromptTooLong, match="max_tokens is 20, together 35"):
            generate(client, "r", [1] * 15, GREEDY)
        with pytest.raises(RequestError, match="token id 100; the model's ids run from 0 to 99"):
            generate(client, "r", [1, 100], GREEDY)
        with pytest.raises(RequestError, match="no tokens"):
            generate(client, "r", [], GREEDY)
        with pytest.raises(RequestError, match="temperature"):
            generate(client, "r", [1], SamplingParams(temperature=-1.0))
        assert await collect(client, "r", [1]) == unbatched([1])


async def test_a_request_beyond_the_queue_is_refused_and_counted_until_then():
    async with engine(SLOW, max_num_seqs=1, max_num_waiting=2) as client:
        streams = [generate(client, f"r{i}", [1], ENDLESS) for i in range(3)]
        assert client.stats.waiting == 3
        with pytest.raises(QueueFull) as error:
            generate(client, "r3", [1], ENDLESS)
        assert error.value.retry_after_seconds > 0
        with pytest.raises(QueueFull):
            generate(client, "r4", [1], ENDLESS)
        await wait_until(lambda: client.stats.running == 1)
        assert client.stats.waiting == 2
        await streams[0].aclose()
        last = generate(client, "r4", [1], GREEDY)
        for stream in streams[1:]:
            await stream.aclose()
        assert (await anext(last)).new_token_ids == unbatched([1])[:1]
        await last.aclose()


async def test_an_engine_that_is_killed_is_noticed_and_named():
    async with engine(SLOW) as client:
        streams = [generate(client, f"r{i}", [1], ENDLESS) for i in range(2)]
        await anext(streams[0])
        started = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDead, match="killed by signal 9"):
                async for _ in stream:
                    pass
        assert time.monotonic() - started < END_SECONDS
        assert client.failure is not None
        assert client.failure.reason == "RankDied"
        with pytest.raises(EngineDead):
            generate(client, "late", [1], GREEDY)


async def test_an_engine_whose_messages_cannot_be_read_is_killed():
    async with engine(SLOW) as client:
        stream = generate(client, "r", [1], ENDLESS)
        await anext(stream)
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.connect(f"ipc://{client._folder.path}/output")
        socket.send(b"no message")
        with pytest.raises(EngineDead, match="cannot be read"):
            async for _ in stream:
                pass
        await wait_until(lambda: not is_running(client.pid), END_SECONDS)
        context.destroy(linger=0)


async def test_a_fatal_error_while_loading_reaches_the_waiter_word_for_word():
    message = "No such folder: /nowhere. Check --model."
    config = fake_config({"fail": ["ModelNotFound", message]})
    client = EngineClient(config, command=COMMAND)
    with pytest.raises(FatalError) as error:
        await client.wait_ready()
    await client.shutdown()
    assert (error.value.reason, error.value.message) == ("ModelNotFound", message)
    assert client.failure is not None


async def test_an_unexpected_exception_ends_the_engine_with_a_traceback(capfd):
    client = EngineClient(fake_config({"crash": True}), command=COMMAND)
    with pytest.raises(FatalError, match="ValueError: crashed as told"):
        await client.wait_ready()
    await client.shutdown()
    assert "Traceback" in capfd.readouterr().err


async def test_a_process_that_ends_at_once_is_a_failure_too():
    client = EngineClient(fake_config({}), command=["false"])
    with pytest.raises(FatalError, match="ended with status 1"):
        await client.wait_ready()
    await client.shutdown()


async def test_a_request_before_the_engine_is_ready_is_refused():
    client = EngineClient(fake_config({"load_seconds": 100}), command=COMMAND)
    with pytest.raises(PagodaError, match="still loading"):
        generate(client, "r", [1], GREEDY)
    # Neither when it is loaded, nor because it is killed.
    started = time.monotonic()
    await client.shutdown(timeout_seconds=2 * END_SECONDS)
    assert time.monotonic() - started < END_SECONDS


async def test_sigterm_and_sigint_leave_the_engine_serving():
    async with engine() as client:
        os.kill(client.pid, signal.SIGTERM)
        os.kill(client.pid, signal.SIGINT)
        assert await collect(client, "r", [1]) == unbatched([1])


async def test_shutdown_ends_process_streams_and_sockets():
    async with engine(SLOW) as client:
        stream = generate(client, "r", [1], ENDLESS)
        await anext(stream)
        folder = Path(client._folder.path)
        assert folder.stat().st_mode & 0o777 == 0o700
        await client.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await anext(stream)
        assert not is_running(client.pid)
        assert not folder.exists()


async def test_an_idle_engine_uses_no_processor():
    async with engine() as client:
        await collect(client, "r", [1])

        def cpu_ticks() -> int:
            fields = Path(f"/proc/{client.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        await asyncio.sleep(0.1)
        before = cpu_ticks()
        await asyncio.sleep(0.5)
        assert cpu_ticks() - before <= 1


def test_the_engine_ends_when_its_parent_is_killed_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    launch = Launch(config=fake_config({"load_seconds": 60}), socket_folder=str(folder))
    line = msgspec.json.encode(launch).decode()
    # The child of this program has its only other end of the pipe, as EngineClient does.
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({COMMAND!r}, stdin=subprocess.PIPE)\n"
        "child.stdin.write(sys.argv[1].encode() + b'\\n'); child.stdin.flush()\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, line], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    time.sleep(0.5)
    assert is_running(child_pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + END_SECONDS
    while is_running(child_pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child_pid)
    assert not folder.exists()
