"""`pagoda bench serve` against a real HTTP server with a fake engine, and against bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from pagoda_runtime.bench.summary import write_json
from pagoda_runtime.cli import main
from pagoda_runtime.errors import PagodaError
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server

SHORT = ("--random-input-len", "5", "--random-output-len", "8", "--vocab-size", "250")


async def bench(url: str, *flags: str) -> int:
    argv = ["bench", "serve", "--base-url", url, "--num-prompts", "6", *SHORT, *flags]
    return await asyncio.to_thread(main, argv)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config().engine)


@pytest_asyncio.fixture
async def url(engine: FakeEngine) -> AsyncIterator[str]:
    async with running_server(make_state(engine, make_config())) as url:
        yield url


@contextlib.asynccontextmanager
async def serving(answer: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """A server that answers each request's head with bytes, and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(head))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def event_stream(*events: str) -> bytes:
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body


def only_models(head: bytes) -> bytes | None:
    if not head.startswith(b"GET"):
        return None
    body = b'{"data": [{"id": "m"}]}'
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("endpoint", ["completions", "chat", "/v1/chat/completions"])
async def test_a_run_reports_every_request(url, endpoint, tmp_path, capsys):
    path = tmp_path / "out" / "result.json"
    flags = ("--endpoint", endpoint, "--max-concurrency", "2", "--output-json", str(path))
    assert await bench(url, *flags) == 0
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"], result["not_sent"]) == (6, 0, 0)
    assert result["total_output_tokens"] == 48
    assert result["output_tokens_from"] == "usage"
    assert result["model_id"] == "fake"
    assert 0 < result["p50_ttft_ms"] <= result["p50_e2el_ms"]
    assert "6 requests completed, 0 failed" in capsys.readouterr().out


async def test_gaps_are_measured_between_tokens(tmp_path):
    event = '{"choices": [{"text": "a"}]}'

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        models = only_models(await reader.readuntil(b"\r\n\r\n"))
        writer.write(models or event_stream(event))
        if not models:
            await asyncio.sleep(0.03)
            writer.write(f"data: {event}\n\ndata: [DONE]\n\n".encode())
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    path = tmp_path / "result.json"
    port = server.sockets[0].getsockname()[1]
    flags = ("--num-prompts", "1", "--output-json", str(path))
    assert await bench(f"http://127.0.0.1:{port}", *flags) == 0
    server.close()
    result = json.loads(path.read_text())
    # All that is sure: on a busy machine both tokens can be read at once.
    assert result["p50_e2el_ms"] >= 25
    gap = pytest.approx(result["p50_e2el_ms"] - result["p50_ttft_ms"])
    assert result["p50_itl_ms"] == gap
    assert result["p50_tpot_ms"] == gap


async def test_a_server_that_loads_is_to_be_tried_again(engine, capsys):
    engine.ready = None
    async with running_server(make_state(engine, make_config())) as url:
        assert await bench(url) == 1
    error = capsys.readouterr().err
    assert "503" in error
    assert "Try again when it is ready" in error


async def test_prompts_are_the_token_ids_of_the_seed(url, engine):
    assert await bench(url, "--seed", "3", "--num-warmups", "0") == 0
    first = sorted(engine.prompts.values())
    engine.prompts.clear()
    assert await bench(url, "--seed", "3", "--num-warmups", "0") == 0
    assert sorted(engine.prompts.values()) == first
    assert {len(prompt) for prompt in first} == {5}


async def test_warm_up_prompts_are_not_those_that_count(url, engine):
    assert await bench(url, "--num-warmups", "2") == 0
    assert len({tuple(prompt) for prompt in engine.prompts.values()}) == 8


async def test_text_prompts_are_words(url, engine):
    assert await bench(url, "--prompt-format", "text") == 0
    prompt = bytes(next(iter(engine.prompts.values()))).decode()
    assert len(prompt.split()) == 5


async def test_an_open_loop_sends_at_the_rate(url, tmp_path):
    path = tmp_path / "result.json"
    flags = ("--request-rate", "200", "--burstiness", "inf", "--output-json", str(path))
    assert await bench(url, *flags) == 0
    assert json.loads(path.read_text())["duration"] >= 5 / 200


async def test_a_server_that_is_down_is_an_error_with_the_remedy(capsys):
    assert await bench("http://127.0.0.1:1") == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1: connection refused" in error
    assert "Start the server, or correct --base-url" in error


async def test_a_wrong_path_names_model_and_base_url(url, capsys):
    assert await bench(f"{url}/nowhere") == 1
    assert "answers 404 and lists no model" in capsys.readouterr().err


async def test_a_missing_key_names_the_flag(engine, capsys):
    state = make_state(engine, make_config("--api-key", "secret"))
    async with running_server(state) as url:
        assert await bench(url) == 1
        assert "Give --api-key" in capsys.readouterr().err
        assert await bench(url, "--api-key", "secret") == 0


async def test_a_request_that_is_refused_ends_the_run_with_the_servers_words(url, capsys):
    assert await bench(url, "--random-input-len", "500") == 1
    error = capsys.readouterr().err
    assert "HTTP 400" in error
    assert "500" in error
    assert "nothing was measured" in error


async def test_overload_is_counted_by_kind(engine, tmp_path, capsys):
    engine.config = make_config("--max-num-seqs", "1", "--max-num-waiting", "0").engine
    engine.step_seconds = 0.005
    async with running_server(make_state(engine, make_config())) as url:
        assert await bench(url) == 1
    assert "5 × HTTP 429" in capsys.readouterr().out


async def test_a_server_without_usage_has_its_chunks_counted(tmp_path, capsys):
    chunk = '{"choices": [{"text": "a"}]}'

    def answer(head: bytes) -> bytes:
        return only_models(head) or event_stream(chunk, chunk, "[DONE]")

    async with serving(answer) as url:
        assert await bench(url) == 0
    assert "the server sends no usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (['{"choices": [{"text": "a"}]}'], "connection lost: the stream ended without [DONE]"),
        (['{"error": {"message": "died"}}', "[DONE]"], "error event: died"),
        (["{", "[DONE]"], "broken answer: an event is no chunk"),
        (["[DONE]"], "broken answer: the stream held no choice"),
    ],
)
async def test_a_stream_that_goes_wrong_is_a_failure(events, expected, capsys):
    def answer(head: bytes) -> bytes:
        return only_models(head) or event_stream(*events)

    async with serving(answer) as url:
        assert await bench(url, "--num-warmups", "0") == 1
    out = capsys.readouterr().out
    assert "0 requests completed, 6 failed" in out
    assert expected in out


async def test_a_silent_server_is_a_timeout(capsys):
    def answer(head: bytes) -> bytes:
        return only_models(head) or b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert await bench(url, "--num-warmups", "0", "--timeout-seconds", "0.05") == 1
    server.close()
    assert "6 × timeout" in capsys.readouterr().out


async def test_a_server_that_dies_midway_ends_the_run_with_what_was_done(tmp_path, capsys):
    async with contextlib.AsyncExitStack() as stack:
        num_answers = 0

        def answer(head: bytes) -> bytes:
            nonlocal num_answers
            if models := only_models(head):
                return models
            num_answers += 1
            if num_answers == 4:
                server.close()
            return event_stream('{"choices": [{"text": "a"}]}', "[DONE]")

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        stack.callback(server.close)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        flags = ("--num-prompts", "100", "--max-concurrency", "1", "--num-warmups", "0")
        path = tmp_path / "result.json"
        assert await bench(url, *flags, "--output-json", str(path)) == 1
    result = json.loads(path.read_text())
    assert result["completed"] == 4
    assert result["failures"] == {"cannot connect": result["failed"]}
    assert result["not_sent"] == 100 - 4 - result["failed"] > 0


def test_a_json_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PagodaError, match=r"--output-json .* cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize(
    "flags",
    [
        ("--request-rate", "0"),
        ("--request-rate", "nan"),
        ("--random-range-ratio", "1"),
        ("--temperature", "3"),
        ("--endpoint", "embeddings"),
        ("--max-concurrency", "0"),
    ],
)
def test_a_flag_out_of_range_is_a_wrong_command_line(flags, capsys):
    assert main(["bench", "serve", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
