"""Reading answers and events from bytes, in whatever pieces they come."""

from __future__ import annotations

import asyncio

import pytest

from pagoda_runtime.bench.http1 import (
    MAX_HEAD_BYTES,
    Answer,
    BrokenAnswer,
    ConnectionLost,
    EventParser,
    encode_request,
    parse_base_url,
)
from pagoda_runtime.errors import RequestError

# The second chunk has line ends of its own.
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nB;x=1\r\n\r\n, 12345\r\n\r\n0\r\n\r\n"
)
WITH_LENGTH = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\nX-A:  b \r\n\r\nhello"


async def read(data: bytes, size: int = 1000, *, ends: bool = False) -> tuple[Answer, bytes]:
    """The answer in bytes that arrive in pieces of a size; `ends`: the connection, after them."""
    reader = asyncio.StreamReader(MAX_HEAD_BYTES)
    answer = Answer(reader)

    async def arrive() -> None:
        for i in range(0, len(data), size):
            reader.feed_data(data[i : i + size])
            await asyncio.sleep(0)
        if ends:
            reader.feed_eof()

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(arrive())
        await answer.read_head()
        body = await answer.read_all()
    return answer, body


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_a_chunked_body_is_joined_however_it_arrives(size):
    answer, body = await read(CHUNKED, size)
    assert body == b"hello\r\n, 12345\r\n"
    assert answer.keeps_alive


async def test_trailers_after_the_last_chunk_are_skipped():
    answer, body = await read(CHUNKED[:-2] + b"X-Sum: 5\r\n\r\n")
    assert body == b"hello\r\n, 12345\r\n"
    assert answer.keeps_alive


@pytest.mark.parametrize("size", [1, 4, 1000])
async def test_a_body_ends_at_its_length(size):
    answer, body = await read(WITH_LENGTH, size)
    assert body == b"hello"
    assert (answer.status, answer.headers["x-a"], answer.keeps_alive) == (404, "b", True)


async def test_a_body_without_length_ends_with_the_connection():
    answer, body = await read(b"HTTP/1.0 200 OK\r\n\r\nabc", ends=True)
    assert body == b"abc"
    assert not answer.keeps_alive


async def test_an_interim_answer_is_skipped():
    answer, body = await read(b"HTTP/1.1 100 Continue\r\n\r\n" + WITH_LENGTH)
    assert body == b"hello"
    assert answer.status == 404


async def test_connection_close_is_honoured():
    answer, _ = await read(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert not answer.keeps_alive


async def test_an_answer_without_a_body_is_complete_at_once():
    answer, body = await read(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert (body, answer.keeps_alive) == (b"", True)


async def test_an_answer_that_was_not_read_to_its_end_keeps_nothing_alive():
    reader = asyncio.StreamReader()
    reader.feed_data(CHUNKED)
    answer = Answer(reader)
    await answer.read_head()
    assert not answer.keeps_alive


@pytest.mark.parametrize("data", [CHUNKED[:-1], WITH_LENGTH[:-1], b"HTTP/1.1 20", b""])
async def test_an_answer_that_breaks_off_is_lost(data):
    with pytest.raises(ExceptionGroup) as error:
        await read(data, ends=True)
    assert error.group_contains(ConnectionLost, match="middle of its answer")


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
async def test_what_is_no_http_is_refused(data):
    with pytest.raises(ExceptionGroup) as error:
        await read(data)
    assert error.group_contains(BrokenAnswer)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_cut_at_lines(size):
    data = b': comment\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": 2}\n\ndata: [DONE]\n\n'
    parser = EventParser()
    events = [e for i in range(0, len(data), size) for e in parser.feed(data[i : i + size])]
    assert events == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


@pytest.mark.parametrize(
    ("url", "host_header", "prefix"),
    [
        ("http://localhost:8000", "localhost:8000", ""),
        ("http://localhost:8000/v1/", "localhost:8000", ""),
        ("https://example.com/models/a/v1", "example.com:443", "/models/a"),
        ("http://[::1]:80", "[::1]:80", ""),
    ],
)
def test_a_base_url_gives_host_port_and_prefix(url, host_header, prefix):
    address = parse_base_url(url)
    assert (address.host_header, address.prefix) == (host_header, prefix)
    request = encode_request("POST", "/v1/completions", address, {}, b"{}")
    assert request.startswith(f"POST {prefix}/v1/completions HTTP/1.1\r\n".encode())
    assert request.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:99999", "a b"])
def test_a_wrong_base_url_is_named_with_the_remedy(url):
    with pytest.raises(RequestError, match="--base-url") as error:
        parse_base_url(url)
    assert url in error.value.message
    assert "http://localhost:8000" in error.value.message
