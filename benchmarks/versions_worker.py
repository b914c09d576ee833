"""One side of `versions.py`: the engine and the server of the interpreter that runs this file.

Reads a line of JSON for each measurement and answers with one; loaded once, so that starting up
does not count.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from server import serving
from sides import KV_CACHE_BYTES, Side, make_prompts, pagoda_side, timed

from pagoda_runtime import LLM

MAX_MODEL_LEN = 2048
OUTPUT_TOKENS = 64
PROMPT_TOKENS = 16
LONG_PROMPT_TOKENS = 1000
SHARED_TOKENS = 960


def measure(side: Side, vocab_size: int, metric: str, number: int) -> float:
    """Tokens/s, or the milliseconds of a time; prompts depend on metric and number alone."""

    def prompts(num_prompts: int, num_tokens: int, *seed: object) -> list[list[int]]:
        return make_prompts(num_prompts, num_tokens, vocab_size, *seed, number)

    match metric:
        case "decode_1" | "decode_16":
            batch_size = int(metric.removeprefix("decode_"))
            given = prompts(batch_size, PROMPT_TOKENS, metric)
            return batch_size * OUTPUT_TOKENS / timed(side, given, OUTPUT_TOKENS)
        case "prefill_1000":
            return LONG_PROMPT_TOKENS / timed(side, prompts(1, LONG_PROMPT_TOKENS, metric), 1)
        case "prefix_hit_ttft":
            (prefix,) = prompts(1, SHARED_TOKENS, "prefix")
            num_own = LONG_PROMPT_TOKENS - SHARED_TOKENS
            (cold,), (hit,) = prompts(1, num_own, "cold"), prompts(1, num_own, "hit")
            timed(side, [prefix + cold], 1)
            return 1000 * timed(side, [prefix + hit], 1)
    raise ValueError(metric)


def main(folder: Path) -> None:
    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    # What the libraries print must not end up among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    flags = ("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN))
    memory = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
    with (
        LLM(
            str(folder),
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
        ) as llm,
        serving(folder, *flags, *memory) as (url, _),
    ):
        side, vocab_size = pagoda_side(llm), llm.facts.vocab_size
        answer(url=url)
        for line in sys.stdin:
            asked = json.loads(line)
            answer(value=measure(side, vocab_size, asked["metric"], asked["number"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
