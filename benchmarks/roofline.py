"""How many decode steps a second the memory allows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pagoda_runtime.platforms import machine
from pagoda_runtime.quantization.unquantized import make_product

NUM_PRODUCTS = 10


def weight_bytes_of_step(folder: Path, config: dict[str, Any]) -> int:
    """Bytes of weights that one decode step reads.

    That is all of them; of an input embedding that is not the output's too, only a row.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                is_lookup = "embed_tokens" in name and not config.get("tie_word_embeddings", True)
                total += 0 if is_lookup else tensor.numel() * tensor.element_size()
    return total


def sum_bandwidth() -> float:
    """Bytes/s of summing 1 GiB of int64."""
    return machine.memory_bandwidth_gbps(1 << 30) * 1e9


def vocabulary_bandwidth(config: dict[str, Any]) -> float:
    """Bytes/s of projecting one row to the vocabulary with the engine's own product."""
    weight = torch.randn(config["vocab_size"], config["hidden_size"]).to(torch.bfloat16)
    num_bytes = weight.numel() * weight.element_size()
    product = make_product(weight)
    del weight
    row = torch.randn(1, config["hidden_size"]).to(torch.bfloat16)
    best = float("inf")
    for _ in range(NUM_PRODUCTS):
        started = time.perf_counter()
        product(row)
        best = min(best, time.perf_counter() - started)
    return num_bytes / best
