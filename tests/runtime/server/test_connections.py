"""Raw bytes over real sockets: what a server does with connections that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime.server import connections
from pagoda_runtime.server.connections import ANSWER, BODY, HEADERS, IDLE, PROBE_ROOM, share_files
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server
from pagoda_runtime.server.testing_process import ServerProcess

BODY_BYTES = b'{"prompt": [97], "max_tokens": 2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
REQUEST = HEAD + b"content-length: %d\r\n\r\n" % len(BODY_BYTES) + BODY_BYTES
MAX_CONNECTIONS = 8


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config().engine, answer="x" * 1000)


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    return make_state(engine, make_config("--api-key", "key", "--disable-access-log"))


@pytest_asyncio.fixture
async def port(state: ServerState) -> AsyncIterator[int]:
    async with running_server(state, MAX_CONNECTIONS) as url:
        yield int(url.rpartition(":")[2])


class Client:
    """One connection, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)

    async def read_answer(self) -> tuple[int, dict[str, Any]]:
        """(status, body) of an answer with Content-Length."""
        head = await self.read_head()
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return int(head.split(b" ")[1]), json.loads(await self.reader.readexactly(length))

    async def read_to_end(self) -> bytes:
        """All that comes until the server closes; nothing if it resets."""
        try:
            return await asyncio.wait_for(self.reader.read(), 5)
        except ConnectionError:
            return b""


@pytest_asyncio.fixture
async def clients(port: int) -> AsyncIterator[list[Client]]:
    clients: list[Client] = []
    yield clients
    for client in clients:
        client.writer.transport.abort()


async def connect(port: int, clients: list[Client]) -> Client:
    clients.append(await Client.connect(port))
    return clients[-1]


@pytest.fixture
def with_key(state: ServerState) -> bytes:
    return REQUEST.replace(b"host: a", b"host: a\r\nauthorization: Bearer key")


async def test_headers_that_do_not_come_end_the_connection(port, clients, monkeypatch):
    monkeypatch.setitem(connections.SECONDS, HEADERS, 0.2)
    silent, slow = await connect(port, clients), await connect(port, clients)
    slow.send(HEAD)
    for _ in range(3):
        await asyncio.sleep(0.04)
        slow.send(b"x")
    status, body = await slow.read_answer()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "0.2 s" in body["error"]["message"]
    assert await slow.read_to_end() == b""
    assert await silent.read_to_end() == b""


async def test_a_body_that_does_not_come_ends_the_connection_and_its_request(
    port, clients, state, with_key, monkeypatch
):
    monkeypatch.setitem(connections.SECONDS, BODY, 0.2)
    client = await connect(port, clients)
    client.send(with_key[:-5])
    status, body = await client.read_answer()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert await client.read_to_end() == b""
    assert state.num_requests == 0


async def test_a_body_that_comes_slowly_but_steadily_is_read(port, clients, with_key, monkeypatch):
    monkeypatch.setitem(connections.SECONDS, BODY, 2.0)
    monkeypatch.setitem(connections.LEAST_BYTES, BODY, 1000)
    padding = b" " * 2000
    length = b"content-length: %d" % (len(BODY_BYTES) + 12 * len(padding))
    head = with_key.removesuffix(BODY_BYTES)
    client = await connect(port, clients)
    client.send(head.replace(b"content-length: %d" % len(BODY_BYTES), length))
    for _ in range(12):
        client.send(padding)
        await asyncio.sleep(0.2)
    client.send(BODY_BYTES)
    assert (await client.read_answer())[0] == 200


async def test_a_body_that_goes_on_after_its_answer_ends_the_connection(port, clients, monkeypatch):
    monkeypatch.setitem(connections.SECONDS, BODY, 0.2)
    client = await connect(port, clients)
    client.send(HEAD + b"content-length: 99\r\n\r\n{")
    assert b" 401 " in await client.read_head()
    await client.read_to_end()


async def test_an_idle_connection_ends_and_a_new_request_has_its_own_time(
    port, clients, with_key, monkeypatch
):
    for awaited in (IDLE, HEADERS):
        monkeypatch.setitem(connections.SECONDS, awaited, 2.0)
    client = await connect(port, clients)
    for _ in range(12):
        await asyncio.sleep(0.2)
        client.send(with_key)
        assert (await client.read_answer())[0] == 200
    monkeypatch.setitem(connections.SECONDS, IDLE, 0.2)
    client.send(with_key)
    assert (await client.read_answer())[0] == 200
    assert await client.read_to_end() == b""


async def test_a_client_that_does_not_read_its_answer_is_cut_off(engine, monkeypatch):
    monkeypatch.setitem(connections.SECONDS, ANSWER, 0.2)
    # More than the buffers on the way hold.
    size = 20_000_000
    state = make_state(engine, make_config("--served-model-name", "m" * size))
    async with running_server(state) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
            # While the buffers fill up it seems to be read.
            await asyncio.sleep(1.2)
            assert await asyncio.to_thread(count_bytes, client) < size


async def test_a_client_that_reads_on_slowly_is_not_cut_off(engine, monkeypatch):
    monkeypatch.setitem(connections.SECONDS, ANSWER, 2.0)
    size = 20_000_000
    state = make_state(engine, make_config("--served-model-name", "m" * size))
    async with running_server(state) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            num_read = 0
            for _ in range(24):
                await asyncio.sleep(0.1)
                num_read += len(await asyncio.to_thread(client.recv, 1 << 18))
            assert num_read < size / 2
            assert num_read + await asyncio.to_thread(count_bytes, client) > size


def count_bytes(client: socket.socket) -> int:
    """What comes until the server closes or resets."""
    size = 0
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 20):
            size += len(data)
    return size


async def test_the_longest_waiting_connection_gives_way_to_a_new_one(port, clients, with_key):
    held = [await connect(port, clients) for _ in range(MAX_CONNECTIONS)]
    for client in held:
        client.send(HEAD)
    probe = await connect(port, clients)
    probe.send(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await probe.read_answer())[0] == 200
    assert await held[0].read_to_end() == b""
    held[1].send(with_key[len(HEAD) - 9 :])
    assert b"HTTP/1.1" in await held[1].read_head()


async def test_a_connection_that_is_being_answered_gives_way_to_nobody(
    port, clients, engine, with_key
):
    engine.step_seconds = 0.3
    answered = await connect(port, clients)
    answered.send(with_key)
    while not engine.running:
        await asyncio.sleep(0.001)
    for _ in range(3 * MAX_CONNECTIONS):
        (await connect(port, clients)).send(HEAD)
    assert (await answered.read_answer())[0] == 200


async def test_as_many_requests_as_connections_leave_room_for_probes(
    port, clients, state, engine, with_key
):
    state.max_num_requests = 2
    engine.step_seconds = 0.5
    running = [await connect(port, clients) for _ in range(2)]
    for client in running:
        client.send(with_key)
    while len(engine.running) < 2:
        await asyncio.sleep(0.001)
    late, probe = await connect(port, clients), await connect(port, clients)
    late.send(with_key)
    status, body = await late.read_answer()
    assert (status, body["error"]["code"]) == (429, "queue_full")
    probe.send(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await probe.read_answer())[0] == 200


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n",
    ],
)
async def test_two_lengths_of_a_body_are_refused_and_the_connection_ends(port, clients, lengths):
    client = await connect(port, clients)
    smuggled = b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n"
    client.send(HEAD + lengths + b"\r\n0\r\n\r\n" + smuggled)
    status, body = await client.read_answer()
    assert (status, body["error"]["code"]) == (400, "bad_http")
    assert await client.read_to_end() == b""


async def test_a_chunked_body_in_http_1_0_is_refused(port, clients):
    client = await connect(port, clients)
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"connection: keep-alive\r\n"
    client.send(head + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n")
    assert (await client.read_answer())[0] == 400
    assert await client.read_to_end() == b""


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://a/version", 200),
        (b"HTTPS://a:99/version?x=http://b/", 200),
        (b"http://a/version/", 200),
        (b"http://a/v1/models", 401),
        (b"http://a/v1/models/", 401),
        (b"http://a/x", 404),
        (b"*", 404),
    ],
)
async def test_a_target_may_be_a_whole_url(port, clients, target, status):
    client = await connect(port, clients)
    client.send(b"GET " + target + b" HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await client.read_answer())[0] == status


@pytest.mark.parametrize("path", [b"/metrics", b"/health", b"/v1/models"])
async def test_head_is_answered_as_get_without_the_body(port, clients, path):
    client = await connect(port, clients)
    headers = b" HTTP/1.1\r\nhost: a\r\nauthorization: Bearer key\r\n\r\n"
    client.send(b"HEAD " + path + headers)
    head = await client.read_head()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) > 2
    client.send(b"GET " + path + headers)
    assert (await client.read_head()).startswith(b"HTTP/1.1 200 ")


async def test_head_is_no_way_to_a_route_that_has_no_get(port, clients):
    client = await connect(port, clients)
    client.send(HEAD.replace(b"POST", b"HEAD") + b"authorization: Bearer key\r\n\r\n")
    assert b" 405 " in await client.read_head()


async def test_head_with_a_body_that_cannot_be_read_is_refused_without_one(port, clients, caplog):
    client = await connect(port, clients)
    client.send(b"HEAD /version HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
    assert b" 400 " in await client.read_head()
    assert await client.read_to_end() == b""
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"\x16\x03\x01 TLS", b"GET /\r\n\r\n"])
async def test_what_is_no_http_has_an_error_in_the_usual_shape(port, clients, data):
    client = await connect(port, clients)
    client.send(data)
    status, body = await client.read_answer()
    assert (status, body["error"]["code"]) == (400, "bad_http")
    assert await client.read_to_end() == b""


async def test_a_body_in_very_many_tiny_chunks_is_refused(port, clients, with_key):
    head = with_key.replace(REQUEST[len(HEAD) :], b"transfer-encoding: chunked\r\n\r\n")
    client = await connect(port, clients)
    client.send(head + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY_BYTES) + b"0\r\n\r\n")
    assert (await client.read_answer())[0] == 200
    client.send(head + b"1\r\n \r\n" * 5000)
    status, body = await client.read_answer()
    assert (status, body["error"]["code"]) == (400, "bad_http")
    assert await client.read_to_end() == b""


@pytest.mark.parametrize("num_files", [256, 1024, 4096, 65536])
@pytest.mark.parametrize("num_requests", [1, 1280, 100_000])
def test_connections_and_backlog_fit_the_open_files(num_files, num_requests):
    limit, backlog = share_files(num_files, num_requests)
    assert limit + backlog <= num_files - 128
    assert limit > PROBE_ROOM
    assert limit <= max(1024, 2 * num_requests + PROBE_ROOM)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    command = ["pagoda_runtime.server.testing", "fake:{}", "--host", "127.0.0.1", "--port", "0"]
    server = ServerProcess(command, tmp_path / "termination-log", max_open_files=256)
    yield server
    server.close()


def test_with_few_open_files_a_probe_gets_in_among_many_strangers(server):
    url = server.wait_for_url(60)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    strangers = []
    try:
        for number in range(300):
            strangers.append(socket.create_connection(address, timeout=20))
            strangers[-1].sendall(HEAD)
            if number % 100 == 99:
                assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        deadline = time.monotonic() + 20
        while len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) > 250:
            assert time.monotonic() < deadline
    finally:
        for stranger in strangers:
            stranger.close()
    assert any("256 open files" in line for line in server.lines)
