"""A 16k-token prompt arrives among 8 decoding requests: what it costs them, and what they cost it.

Every round measures the long prompt alone, then the others' gaps between tokens before and while a
second long prompt is computed. `make bench-long` runs it.

    python benchmarks/long_prompt.py --out FILE [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from pathlib import Path
from statistics import median

from checkpoints import gemma_folder, require_model
from report import Bar, Result, publish
from sides import KV_CACHE_BYTES, make_prompts

from pagoda_runtime import SamplingParams
from pagoda_runtime.bench.summary import percentile
from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.config import EngineConfig

NUM_DECODING = 8
SHORT_PROMPT_TOKENS = 16
DECODE_TOKENS = 8192
# Tokens that each of them has, before and while its gaps count as those before.
SETTLING_TOKENS = 8
MEASURED_TOKENS = 64


class Decoder:
    """A request that decodes until it is cancelled; when each of its tokens came."""

    def __init__(self, client: EngineClient, name: str, prompt: list[int]) -> None:
        self.times: list[float] = []
        params = SamplingParams(temperature=0.0, max_tokens=DECODE_TOKENS, ignore_eos=True)
        self._stream = client.generate(client.make_request(name, prompt, params))
        self._task = asyncio.create_task(self._read())

    async def wait_for(self, num_tokens: int) -> None:
        while len(self.times) < num_tokens:
            if self._task.done():
                raise RuntimeError("a decoding request ended too early")
            await asyncio.sleep(0.005)

    def gaps(self, start: float, end: float) -> list[float]:
        """Of tokens that came after start, up to the first one after end."""
        pairs = itertools.pairwise(self.times)
        return [after - before for before, after in pairs if after > start and before < end]

    async def cancel(self) -> None:
        await self._stream.aclose()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        async for _ in self._stream:
            self.times.append(time.perf_counter())


async def time_to_first_token(client: EngineClient, name: str, prompt: list[int]) -> float:
    started = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    async for _ in client.generate(client.make_request(name, prompt, params)):
        pass
    return time.perf_counter() - started


async def measure_round(
    client: EngineClient, number: int, prompt_tokens: int, vocab_size: int
) -> dict[str, float]:
    """Seconds: ttft_alone, ttft_among, gap_before (median), gap_during (p99)."""
    alone, among = make_prompts(2, prompt_tokens, vocab_size, "long", number)
    ttft_alone = await time_to_first_token(client, f"alone-{number}", alone)
    prompts = make_prompts(NUM_DECODING, SHORT_PROMPT_TOKENS, vocab_size, "short", number)
    decoders = [Decoder(client, f"short-{number}-{i}", ids) for i, ids in enumerate(prompts)]
    try:
        for decoder in decoders:
            await decoder.wait_for(SETTLING_TOKENS)
        settled = time.perf_counter()
        for decoder in decoders:
            await decoder.wait_for(SETTLING_TOKENS + MEASURED_TOKENS)
        arrival = time.perf_counter()
        ttft_among = await time_to_first_token(client, f"among-{number}", among)
        end = arrival + ttft_among
        for decoder in decoders:
            await decoder.wait_for(len(decoder.times) + 1)
    finally:
        for decoder in decoders:
            await decoder.cancel()
    before = [gap for decoder in decoders for gap in decoder.gaps(settled, arrival)]
    during = sorted(gap for decoder in decoders for gap in decoder.gaps(arrival, end))
    figures = {
        "ttft_alone": ttft_alone,
        "ttft_among": ttft_among,
        "gap_before": median(before),
        "gap_during": percentile(during, 99),
    }
    shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in figures.items())
    print(f"  round {number}: {shown}", flush=True)
    return figures


async def measure(arguments: argparse.Namespace) -> list[Result]:
    config = EngineConfig(
        model=str(arguments.model),
        dtype="bfloat16",
        max_model_len=arguments.prompt_tokens + DECODE_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    client = EngineClient(config)
    try:
        facts = await client.wait_ready()
        await time_to_first_token(client, "warm-up", list(range(100, 612)))
        rounds = [
            await measure_round(client, number, arguments.prompt_tokens, facts.vocab_size)
            for number in range(1, arguments.rounds + 1)
        ]
    finally:
        await client.shutdown()
    figures = {name: 1000 * median(r[name] for r in rounds) for name in rounds[0]}
    return [
        Result(
            metric="gap_during_long_prompt",
            value=figures["gap_during"],
            unit="ms",
            peer="median gap before (value: p99)",
            peer_value=figures["gap_before"],
            bar=Bar(at_most=4.0),
        ),
        Result(
            metric="ttft_long_prompt",
            value=figures["ttft_among"],
            unit="ms",
            peer="alone",
            peer_value=figures["ttft_alone"],
            bar=Bar(at_most=2.5),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=gemma_folder())
    parser.add_argument("--rounds", type=int, default=3, help="the medians count")
    parser.add_argument("--prompt-tokens", type=int, default=16384, help="of the long prompt")
    arguments = parser.parse_args()
    require_model(arguments.model)
    results = asyncio.run(measure(arguments))
    settings = {"rounds": arguments.rounds, "prompt_tokens": arguments.prompt_tokens}
    publish("long-prompt", results, arguments.out, **settings, num_decoding=NUM_DECODING)


if __name__ == "__main__":
    main()
