"""Start, drain and death of a real server process, with an engine process without a model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_ready(url: str) -> None:
    until(lambda: httpx.get(f"{url}/ready").status_code == 200)


def wait_until_draining(url: str) -> None:
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)


def load_of(url: str) -> tuple[int, int, float]:
    load = httpx.get(f"{url}/load").json()
    return load["running"], load["waiting"], load["kv_usage"]


class Stream:
    """A streamed completion that a thread reads."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.text = ""
        self.connection = ""
        self.began = threading.Event()
        self._body = {"prompt": [1], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._url = url
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.began.wait(10)

    def _read(self) -> None:
        url = f"{self._url}/v1/completions"
        with httpx.stream("POST", url, json=self._body, timeout=30) as answer:
            self.connection = answer.headers.get("connection", "")
            try:
                for text in answer.iter_text():
                    self.text += text
                    self.began.set()
            except httpx.RemoteProtocolError:
                self.text += "CUT"

    def wait(self) -> str:
        self._thread.join(30)
        return self.text


def complete(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1})


def test_http_answers_while_the_engine_loads(start):
    server = start(load_seconds=3.0)
    url = server.wait_for_url()
    startup = httpx.get(f"{url}/startup")
    assert startup.status_code == 503
    assert set(startup.json()) == {"phase", "percent", "bytes_per_second", "eta_seconds"}
    assert httpx.get(f"{url}/health").status_code == 200
    assert "vllm:num_requests_waiting" in httpx.get(f"{url}/metrics").text
    assert complete(url).status_code == 503
    wait_until_ready(url)
    assert httpx.get(f"{url}/startup").status_code == 200
    assert complete(url).status_code == 200


def test_a_start_tells_how_long_it_still_takes(start):
    url = start(load_seconds=3.0).wait_for_url()
    deadline = time.monotonic() + 20
    while (said := httpx.get(f"{url}/startup").json())["percent"] < 50:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (said["phase"], said["percent"]) == ("load", 50.0)
    # The first half took half a second, or more where the machine is busy.
    assert 0.5 <= said["eta_seconds"] < 5


def test_sigterm_loses_no_stream_and_serves_through_the_delay(start):
    server = start("--drain-delay-seconds", "3", step_seconds=0.02)
    url = server.wait_for_url()
    wait_until_ready(url)
    # It outlives the delay by three seconds.
    stream = Stream(url, max_tokens=300)
    server.process.send_signal(signal.SIGTERM)
    wait_until_draining(url)
    late = complete(url)
    assert (late.status_code, late.headers["connection"]) == (200, "close")
    until(lambda: complete(url).status_code != 200)
    refused = complete(url)
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert int(refused.headers["retry-after"]) >= 1
    text = stream.wait()
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text
    assert server.wait() == 0


def test_an_idle_server_ends_when_the_delay_is_over(start):
    server = start("--drain-delay-seconds", "0.2")
    wait_until_ready(server.wait_for_url())
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - started >= 0.2


def test_a_request_that_outlives_the_drain_ends_with_an_error(start):
    server = start("--drain-delay-seconds", "0", "--drain-seconds", "0.3", step_seconds=0.02)
    url = server.wait_for_url()
    wait_until_ready(url)
    stream = Stream(url, max_tokens=3000)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert '"error":{"message":"The engine was shut down."' in stream.wait()


def test_a_second_sigterm_ends_the_server_at_once(start):
    server = start(step_seconds=0.02)
    url = server.wait_for_url()
    wait_until_ready(url)
    stream = Stream(url, max_tokens=3000)
    (engine,) = server.children()
    server.process.send_signal(signal.SIGTERM)
    wait_until_draining(url)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    assert not Path(f"/proc/{engine}").exists()
    stream.wait()


def test_sigterm_while_loading_ends_the_server(start):
    server = start(load_seconds=30)
    server.wait_for_url()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_an_engine_that_cannot_start_ends_the_server_with_its_last_words(start, log):
    server = start(fail=["KvCacheTooSmall", "No room: raise --kv-cache-memory-bytes."])
    assert server.wait() == 1
    words = json.loads(log.read_text())
    assert words == {
        "reason": "KvCacheTooSmall",
        "message": "No room: raise --kv-cache-memory-bytes.",
    }
    assert "Traceback" not in "".join(server.lines)


def test_an_engine_that_dies_ends_the_server_and_its_streams(start, log):
    server = start(step_seconds=0.02)
    url = server.wait_for_url()
    wait_until_ready(url)
    stream = Stream(url, max_tokens=3000)
    (engine,) = server.children()
    os.kill(engine, signal.SIGKILL)
    assert server.wait() == 1
    assert '"code":"engine_dead"' in stream.wait()
    words = json.loads(log.read_text())
    assert words["reason"] in ("RankDied", "OutOfMemory")
    assert "killed by signal 9" in words["message"]


def test_a_client_that_leaves_frees_its_slot_in_the_engine_process(start):
    server = start(step_seconds=0.02)
    url = server.wait_for_url()
    wait_until_ready(url)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    for stream in (True, False):
        fields = {"prompt": [1], "max_tokens": 3000, "ignore_eos": True, "stream": stream}
        body = json.dumps(fields).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(head + body)
            until(lambda: load_of(url)[0] == 1)
            if stream:
                assert client.recv(1)
        # Long before the answer would have been whole.
        until(lambda: load_of(url) == (0, 0, 0))


def test_the_admin_port_empties_the_prefix_cache_and_ends_with_the_server(start):
    server = start("--admin-port", "0", "--drain-delay-seconds", "0")
    url = server.wait_for_url()
    wait_until_ready(url)
    (admin,) = re.findall(r"Admin port on (http://127.0.0.1:\d+)", "".join(server.lines))
    body = {"prompt": list(range(20)), "max_tokens": 1}
    httpx.post(f"{url}/v1/completions", json=body)
    assert httpx.post(f"{admin}/reset_prefix_cache").json()["num_blocks"] == 5
    assert httpx.post(f"{admin}/reset_prefix_cache").json()["num_blocks"] == 0
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert httpx.post(f"{url}/reset_prefix_cache").status_code == 404
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_an_admin_port_in_use_is_named(start, log):
    port = start().wait_for_url().rpartition(":")[2]
    assert start("--admin-port", port).wait() == 2
    assert f"{port}" in json.loads(log.read_text())["message"]
    assert "--admin-port" in json.loads(log.read_text())["message"]


def test_a_port_in_use_is_named(start, log):
    first = start()
    port = first.wait_for_url().rpartition(":")[2]
    second = start("--port", port)
    assert second.wait() == 2
    assert port in json.loads(log.read_text())["message"]
