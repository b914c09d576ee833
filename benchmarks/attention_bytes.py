"""Bytes that attention's Triton kernels load, counted in the interpreter beside what they must.

    TRITON_INTERPRET=1 python benchmarks/attention_bytes.py --out FILE

Single tokens, as 8 sequences of 4096 tokens, beside their keys and values; a prompt chunk beside
the keys and values that its tiles see, each once for a tile. `make bench-attention-bytes` runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from report import Bar, Result, publish

from pagoda_kernels.kv_cache import make_kv_cache, token_bytes
from pagoda_kernels.launch import num_processors
from pagoda_kernels.paged_attention import AttentionSpec
from pagoda_kernels.paged_attention.decode_kernel import Rows, attend_rows, split_keys
from pagoda_kernels.paged_attention.prefill_kernel import Chunks, attend_chunks, cut_chunks
from pagoda_kernels.paged_attention.tiles import Step
from pagoda_kernels.testing import watch_moves

# Of Llama 3.1 8B.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
CPU = torch.device("cpu")
KV_DTYPES = {
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def make_spec(kv_dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        windows=(0,),
        scale=HEAD_DIM**-0.5,
        dtype=torch.float16,
        kv_dtype=kv_dtype,
        block_size=BLOCK_SIZE,
        device=CPU,
    )


def loaded_bytes(
    spec: AttentionSpec, num_tokens: int, num_seqs: int, context: int, run: Callable[[Step], None]
) -> int:
    """What a step loads whose sequences have full blocks of their own, one after the other."""
    shape = num_seqs * context // BLOCK_SIZE, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM
    kv_cache = make_kv_cache(shape, spec.kv_dtype, CPU)
    for stored in kv_cache.tensors:
        stored.fill_(1)
    table = torch.arange(shape[0], dtype=torch.int32).view(num_seqs, -1)
    heads = torch.ones(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, dtype=spec.dtype)
    out = torch.empty(num_tokens, NUM_HEADS, HEAD_DIM, dtype=spec.dtype)
    with watch_moves() as moves:
        run(Step(heads, kv_cache, table, None, None, out))
    return moves.loaded_bytes


def measure_decode(name: str, num_seqs: int, context: int) -> Result:
    spec = make_spec(KV_DTYPES[name])
    order = torch.arange(num_seqs, dtype=torch.int32)
    rows = Rows(order, order, torch.full_like(order, context))
    splits = split_keys(spec, num_seqs, context, num_processors(CPU))
    loaded = loaded_bytes(
        spec, num_seqs, num_seqs, context, lambda step: attend_rows(step, spec, 0, rows, splits)
    )
    return Result(
        f"decode_bytes_{name}",
        loaded,
        "bytes",
        "keys and values, with scales",
        num_seqs * context * token_bytes(NUM_KV_HEADS, HEAD_DIM, spec.kv_dtype),
        bar=Bar(at_most=1.05),
        details={"num_seqs": num_seqs, "context": context, "splits": splits.num_programs},
    )


def measure_prefill(name: str, num_tokens: int, context: int, num_rows: int) -> Result:
    spec = make_spec(KV_DTYPES[name])
    group = NUM_HEADS // NUM_KV_HEADS
    tiles = cut_chunks(
        np.array([0]), np.array([num_tokens]), np.array([context]), num_rows // group
    )
    chunks = Chunks(torch.from_numpy(tiles), num_rows)
    loaded = loaded_bytes(
        spec, num_tokens, 1, context, lambda step: attend_chunks(step, spec, 0, chunks)
    )
    seen = int((tiles[:, 2] + tiles[:, 3]).sum())
    of_token = token_bytes(NUM_KV_HEADS, HEAD_DIM, spec.kv_dtype)
    return Result(
        f"prefill_bytes_{name}_{num_rows}_rows",
        loaded,
        "bytes",
        "keys and values that tiles see, with scales",
        seen * of_token,
        bar=Bar(at_most=1.05),
        details={
            "num_tokens": num_tokens,
            "context": context,
            "times_each_key_is_read": round(loaded / (context * of_token), 2),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    results = []
    for name in KV_DTYPES:
        results.append(measure_decode(name, num_seqs=8, context=4096))
        num_rows = 128 if name == "float16" else 64
        results.append(measure_prefill(name, num_tokens=256, context=2048, num_rows=num_rows))
    heads = f"{NUM_HEADS} heads, {NUM_KV_HEADS} key heads, head_dim {HEAD_DIM}"
    publish("attention-bytes", results, arguments.out, heads=heads, block_size=BLOCK_SIZE)


if __name__ == "__main__":
    main()
