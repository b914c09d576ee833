"""sentence-transformers in an environment of its own: see embed.py.

    python embed_worker.py NUM_THREADS

Each line of standard input names a model, a dtype, and texts, or pairs for a cross-encoder; each
line of standard output says how many seconds they took, and has the vectors or scores.
"""

from __future__ import annotations

import functools
import json
import sys
import time

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer


@functools.lru_cache(maxsize=1)
def load(model: str, dtype: str, is_cross_encoder: bool) -> SentenceTransformer | CrossEncoder:
    kind = CrossEncoder if is_cross_encoder else SentenceTransformer
    return kind(model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})


def main(num_threads: str) -> None:
    torch.set_num_threads(int(num_threads))
    for line in sys.stdin:
        asked = json.loads(line)
        model = load(asked["model"], asked["dtype"], "pairs" in asked)
        started = time.perf_counter()
        if "pairs" in asked:
            found = model.predict(asked["pairs"], show_progress_bar=False, convert_to_tensor=True)
        else:
            found = model.encode(asked["texts"], show_progress_bar=False, convert_to_tensor=True)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "found": found.float().tolist()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
