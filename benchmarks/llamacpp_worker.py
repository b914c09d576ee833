"""llama.cpp, driven through its batch interface: `llamacpp` starts it in an environment of its own.

    python llamacpp_worker.py MODEL.gguf

reads one JSON object a line and answers each with one. Nothing of Pagoda is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

# Of a sequence's cells in the cache.
CELLS = 256
LOGITS_AT_ONCE = 64


class Model:
    """A GGUF file, and a context for the latest settings."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._settings: Any = None
        self._context: Any = None

    def configure(
        self, *, sequences: int, tokens: int, threads: int, ubatch: int, flash: int
    ) -> None:
        """A context with room for sequences of so many tokens each, unless it is there."""
        settings = sequences, tokens, threads, ubatch, flash
        if settings == self._settings:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_batch_free(self._batch)
        params = llama_cpp.llama_context_default_params()
        cells = -(-tokens // CELLS) * CELLS
        params.n_ctx = params.n_batch = sequences * cells
        params.n_ubatch, params.n_seq_max = ubatch, sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.swa_full = False
        self._context = llama_cpp.llama_init_from_model(self.model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {settings}")
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._settings = settings

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> np.ndarray[Any, Any]:
        """[outputs, vocabulary] logits of (token, position, sequence, is an output)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_output) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = is_output
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        size = sum(row[3] for row in rows), self.vocab_size
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), size)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """Greedily; the number of tokens that came out."""
        self.clear()
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for number in range(max_tokens):
            tokens = self.decode(rows).argmax(1).tolist()
            rows = [
                (token, len(prompt) + number, sequence, True)
                for sequence, (token, prompt) in enumerate(zip(tokens, prompts, strict=True))
            ]
        return len(prompts) * max_tokens

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        total, count = 0.0, 0
        for window in windows:
            self.clear()
            for first in range(0, len(window) - 1, LOGITS_AT_ONCE):
                places = range(first, min(first + LOGITS_AT_ONCE, len(window) - 1))
                logits = self.decode([(window[i], i, 0, True) for i in places])
                logits = logits - logits.max(1, keepdims=True)
                wanted = logits[range(len(places)), [window[i + 1] for i in places]]
                total += float(np.log(np.exp(logits).sum(1)).sum() - wanted.sum())
                count += len(places)
        return math.exp(total / count)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)


def quantize(source: str, target: str) -> None:
    """To Q4_0, as llama.cpp's own program does it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantize {source}")


def answer(model: Model, question: dict[str, Any]) -> Any:
    model.configure(**question["settings"])
    if "windows" in question:
        return model.perplexity(question["windows"])
    return model.generate(question["prompts"], question["max_tokens"])


def main() -> None:
    # Whatever llama.cpp prints is not an answer.
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if len(sys.argv) == 3:
            quantize(sys.argv[1], sys.argv[2])
            return
        model = Model(sys.argv[1])
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
