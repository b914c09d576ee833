"""What requests of strangers cost a server and its other clients.

A real `pagoda serve` of a tiny random model, with as many special tokens as large models have,
gets one attack; meanwhile a neighbour streams tokens and another client sends short requests. Each
attack meets a fresh server. `make bench-strangers` runs it.

    python benchmarks/strangers.py --out FILE [--only NAME …]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Bar, Result, publish
from server import serving

from pagoda_runtime.bench.http1 import Address, parse_base_url
from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer

NUM_SPECIAL_TOKENS = 6249
CONTEXT = 32768
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FLAGS = ("--num-threads", "1", "--kv-cache-memory-bytes", "100000000", "--dtype", "float32")
FLAGS += ("--long-prefill-token-threshold", "2048", "--max-num-batched-tokens", "2048")
FEW_FILES = 256
NUM_STRANGERS = 235
PATIENCE_SECONDS = 180.0
HALF_A_HEADER_SECONDS = 30.0
# The same figures without an attack, since others may use the machine, too.
CALM_SECONDS = 5.0
# What an attack may cost, on a machine that others use, too.
ALLOWED = {"peak": (100.0, "MB"), "gap": (1.0, "s"), "wait": (2.0, "s"), "kept": (30.0, "MB")}


@dataclass(frozen=True, slots=True)
class Attack:
    """Bodies, made of their numbers, that are sent one after another."""

    name: str
    body: Callable[[int], bytes]
    path: str = "/v1/completions"
    times: int = 1


def _repeat(start: str, item: str, end: str, num_bytes: int) -> Callable[[int], bytes]:
    count = (num_bytes - len(start) - len(end)) // (len(item) + 1)
    return lambda _: (start + ",".join([item] * count) + end).encode()


def _choices(num_prompts: int, n: int) -> Callable[[int], bytes]:
    fields = {"prompt": [[5]] * num_prompts, "n": n, "temperature": 1, "max_tokens": 1}
    return lambda _: json.dumps(fields).encode()


def _text(num_bytes: int) -> Callable[[int], bytes]:
    return lambda _: json.dumps({"prompt": "some words " * (num_bytes // 11)}).encode()


def _name(num_bytes: int) -> Callable[[int], bytes]:
    """A request that is refused, with the long name of an unknown field."""
    return lambda number: b'{"model":"no","prompt":"a","%d%s":1}' % (number, b"x" * num_bytes)


MESSAGES = ('{"messages":[', '{"role":"user","content":""}', "]}")
LISTS = ('{"prompt":"a","max_tokens":1,"metadata":{"a":[', "[]", "]}}")
ATTACKS = (
    Attack("choices_60x128", _choices(60, 128)),
    # As many as the slots and the queue hold.
    Attack("choices_10x128", _choices(10, 128)),
    Attack("choices_1000x16", _choices(1000, 16)),
    Attack("text_15mb", _text(15_000_000)),
    Attack("text_5mb", _text(5_000_000)),
    Attack("messages_31mb", _repeat(*MESSAGES, 31_000_000), "/v1/chat/completions"),
    Attack("messages_5mb", _repeat(*MESSAGES, 5_000_000), "/v1/chat/completions"),
    Attack("lists_31mb", _repeat(*LISTS, 31_000_000)),
    Attack("lists_5mb", _repeat(*LISTS, 5_000_000)),
    Attack("names_8mb", _name(8_000_000), times=30),
    Attack("names_3mb", _name(3_000_000), times=30),
)


def ask(address: Address, path: str, body: bytes) -> int:
    """The status; 0 if the connection ends without one."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE_SECONDS)
    try:
        with contextlib.suppress(ConnectionError):
            connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


class Neighbour(threading.Thread):
    """Reads a stream of tokens and keeps the longest time without one."""

    def __init__(self, address: Address) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.longest_gap = 0.0
        self.last: float | None = None

    def run(self) -> None:
        fields = {"prompt": [7], "max_tokens": CONTEXT - 10, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection(self.address.host, self.address.port)
        connection.request("POST", "/v1/completions", json.dumps(fields).encode())
        answer = connection.getresponse()
        while answer.readline().startswith((b"data: {", b"\n")):
            now = time.monotonic()
            self.longest_gap = max(self.longest_gap, now - (self.last or now))
            self.last = now

    def gap_since(self) -> float:
        """The longest gap, one that is not over yet included."""
        assert self.last is not None
        return max(self.longest_gap, time.monotonic() - self.last)


class ShortRequests(threading.Thread):
    """Sends prompts that are just too long to be tokenized at once; keeps the longest wait."""

    def __init__(self, address: Address) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.longest_wait = 0.0
        self.is_over = threading.Event()

    def run(self) -> None:
        body = json.dumps({"prompt": "a " * 1100, "max_tokens": 1}).encode()
        while not self.is_over.wait(0.1):
            started = time.monotonic()
            ask(self.address, "/v1/completions", body)
            self.longest_wait = max(self.longest_wait, time.monotonic() - started)


def memory(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, status
    return int(found[1]) / 1000


def measure(attack: Attack, folder: Path) -> list[Result]:
    bodies = [attack.body(number) for number in range(attack.times)]
    with serving(folder, *FLAGS) as (url, server):
        address, pid = parse_base_url(url), server.process.pid
        neighbour, others = Neighbour(address), ShortRequests(address)
        neighbour.start()
        others.start()
        time.sleep(CALM_SECONDS)
        calm = {"gap": neighbour.gap_since(), "wait": others.longest_wait}
        neighbour.longest_gap, others.longest_wait = 0.0, 0.0
        before = memory(pid, "VmRSS")
        # The peak begins anew.
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
        started = time.monotonic()
        statuses = [ask(address, attack.path, body) for body in bodies]
        seconds = time.monotonic() - started
        time.sleep(1.0)
        others.is_over.set()
        others.join()
        figures = {
            "peak": memory(pid, "VmHWM") - before,
            "gap": neighbour.gap_since(),
            "wait": others.longest_wait,
        }
        time.sleep(2.0)
        figures["kept"] = memory(pid, "VmRSS") - before
    details = {
        "statuses": sorted(set(statuses)),
        "bytes": len(bodies[0]),
        "seconds": round(seconds, 2),
    }
    print(f"  {attack.name}: {details}", flush=True)
    return [
        Result(
            f"{attack.name}_{name}",
            max(0.0, value),
            ALLOWED[name][1],
            "allowed",
            ALLOWED[name][0],
            Bar(at_most=1.0),
            details if name == "peak" else {"calm": round(calm[name], 3)} if name in calm else {},
        )
        for name, value in figures.items()
    ]


@contextlib.contextmanager
def strangers(address: Address, count: int) -> Iterator[list[socket.socket]]:
    """Connections with half a header each."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            stranger = socket.create_connection((address.host, address.port), timeout=5)
            opened.append(stack.enter_context(stranger))
            with contextlib.suppress(ConnectionError):
                stranger.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n")
        yield opened


def is_open(stranger: socket.socket) -> bool:
    """Whether nothing came from the server, neither an answer nor the end."""
    stranger.setblocking(False)
    try:
        stranger.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def measure_half_headers(folder: Path) -> list[Result]:
    """Connections that stay open; and probes that fail where there are few file descriptors."""
    with (
        serving(folder, *FLAGS) as (url, _),
        strangers(parse_base_url(url), NUM_STRANGERS) as opened,
    ):
        time.sleep(HALF_A_HEADER_SECONDS)
        num_open = sum(map(is_open, opened))
    # For good, so this comes last.
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))
    failed = 0
    with serving(folder, *FLAGS) as (url, _):
        address = parse_base_url(url)
        with strangers(address, NUM_STRANGERS):
            for _ in range(10):
                failed += not is_healthy(address)
    return [
        Result("half_headers_open", num_open, "connections", "allowed", 1, Bar(at_most=0.0)),
        Result("probes_failed", failed, "of 10", "allowed", 1, Bar(at_most=0.0)),
    ]


def is_healthy(address: Address) -> bool:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def make_model(folder: Path) -> Path:
    """A tiny model with a long context and thousands of special tokens."""
    from tokenizers import Tokenizer

    model = make_tiny_checkpoint(folder, max_position_embeddings=CONTEXT, vocab_size=8192)
    write_tiny_tokenizer(model, TEMPLATE)
    path = str(model / "tokenizer.json")
    tokenizer: Any = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([f"<unused{number}>" for number in range(NUM_SPECIAL_TOKENS)])
    tokenizer.save(path)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", nargs="+", help="names of attacks; half_headers is one")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny")
        for attack in ATTACKS:
            if not arguments.only or attack.name in arguments.only:
                results += measure(attack, model)
        if not arguments.only or "half_headers" in arguments.only:
            results += measure_half_headers(model)
    publish("strangers", results, arguments.out, context=CONTEXT, few_files=FEW_FILES)


if __name__ == "__main__":
    main()
