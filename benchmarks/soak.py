"""Memory of a server over many requests: the API process and the engine process.

A real `pagoda serve` of a tiny random model answers requests of mixed lengths, some with a shared
prefix, on both endpoints; one of 20 clients leaves early. `make soak` runs it.

    python benchmarks/soak.py --out FILE [--num-requests 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import tempfile
import time
from pathlib import Path

import uvloop
from report import Bar, Result, publish
from server import serving

from pagoda_runtime.bench.client import HttpClient
from pagoda_runtime.bench.endpoint import (
    ENDPOINTS,
    BodyOptions,
    RequestRecord,
    encode_body,
    measure,
)
from pagoda_runtime.bench.http1 import parse_base_url
from pagoda_runtime.bench.load import run_load
from pagoda_runtime.bench.workloads.base import BenchRequest, random_token_ids
from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer

NUM_CONNECTIONS = 16
# Ids of bytes in the tiny tokenizer.
VOCAB_SIZE = 256
LEAVES_EVERY = 20
PATIENCE_SECONDS = 0.01
SETTLING_SECONDS = 2.0
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FLAGS = ("--num-threads", "1", "--kv-cache-memory-bytes", "8000000", "--served-model-name", "tiny")


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None, status
    return int(found[1]) * 1024


def make_body(number: int) -> tuple[int, str, bytes]:
    """(number, path, body) of a request."""
    rng = random.Random(number)
    prefix = random_token_ids(40, VOCAB_SIZE, random.Random(number % 7)) if number % 2 else []
    prompt = prefix + random_token_ids(rng.randint(1, 60), VOCAB_SIZE, rng)
    # Words in a chat are longer than the tokens that they stand for.
    is_chat = number % 3 == 0
    request = BenchRequest(prompt[:20] if is_chat else prompt, rng.randint(1, 24))
    endpoint = ENDPOINTS["chat" if is_chat else "completions"]
    options = BodyOptions("tiny", float(number % 5 == 0), ignore_eos=True, prompt_as_text=False)
    return number, endpoint.path, encode_body(endpoint, request, options)


async def send_requests(client: HttpClient, first: int, last: int) -> None:
    """Raises RuntimeError if one fails that should not."""

    async def send(item: tuple[int, str, bytes]) -> RequestRecord:
        number, path, body = item
        leaves = number % LEAVES_EVERY == 0
        patience = PATIENCE_SECONDS if leaves else 60.0
        record = await measure(client, path, body, timeout_seconds=patience)
        if record.failure is not None and not leaves:
            raise RuntimeError(f"request {number}: {record.failure}: {record.detail}")
        return record

    items = [make_body(number) for number in range(first, last)]
    await run_load(items, [0.0] * len(items), send, max_concurrency=NUM_CONNECTIONS)


async def soak(url: str, pids: dict[str, int], milestones: list[int]) -> dict[str, list[int]]:
    """Resident bytes of each process after so many requests."""
    client = HttpClient(parse_base_url(url), {})
    sizes: dict[str, list[int]] = {name: [] for name in pids}
    started, first = time.monotonic(), 0
    for milestone in milestones:
        await send_requests(client, first, milestone)
        await asyncio.sleep(SETTLING_SECONDS)
        for name, pid in pids.items():
            sizes[name].append(resident_bytes(pid))
        shown = ", ".join(f"{name} {size[-1] / 1e6:.1f} MB" for name, size in sizes.items())
        print(f"  {milestone} requests, {time.monotonic() - started:.0f} s: {shown}", flush=True)
        first = milestone
    await client.close()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--num-requests", type=int, default=10_000, help="the first tenth is what counts as before"
    )
    arguments = parser.parse_args()
    milestones = [arguments.num_requests * tenth // 10 for tenth in range(1, 11)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder) / "tiny")
        write_tiny_tokenizer(model, TEMPLATE)
        with serving(model, *FLAGS) as (url, server):
            (engine_pid,) = server.children()
            pids = {"api": server.process.pid, "engine": engine_pid}
            sizes = uvloop.run(soak(url, pids, milestones))
    results = [
        Result(
            metric=f"{name}_resident_size",
            value=size[-1] / 1e6,
            unit="MB",
            peer=f"after {milestones[0]} requests",
            peer_value=size[0] / 1e6,
            bar=Bar(at_most=1.03),
            details={"after_each_tenth_mb": [round(value / 1e6, 1) for value in size]},
        )
        for name, size in sizes.items()
    ]
    publish("soak", results, arguments.out, num_requests=arguments.num_requests)


if __name__ == "__main__":
    main()
