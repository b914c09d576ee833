"""How fast attention reads keys and values, and multiplies by them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.machine import card_bandwidth_gbps
from gpu.scale import Scale
from pagoda_kernels.kv_cache import token_bytes
from pagoda_kernels.paged_attention import AttentionBackend, AttentionSpec, Rotary, make_backend

KV_DTYPES: Mapping[str, torch.dtype | None] = {
    "bf16": None,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""None: the model's own."""
# Runs of a graph, so that its own launch counts little.
_RECORDED = 4
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16


def measure_attention(scale: Scale, device: torch.device) -> dict[str, float]:
    """GB/s of reading memory and of decode attention, TFLOP/s of a prompt's."""
    figures = {"read_gbps": read_gbps(scale, device)}
    if device.type == "cuda" and (card_gbps := card_bandwidth_gbps()):
        figures["card_gbps"] = card_gbps
    for name, kv_dtype in KV_DTYPES.items():
        figures[f"decode_attention_{name}_gbps"] = decode_gbps(scale, device, kv_dtype)
    ours, theirs = prefill_tflops(scale, device)
    return {**figures, "prefill_attention_tflops": ours, "sdpa_tflops": theirs}


def read_gbps(scale: Scale, device: torch.device) -> float:
    """Of a sum."""
    data = torch.ones(scale.read_bytes // 4, dtype=torch.float32, device=device)
    return data.nbytes / seconds_of(data.sum, scale, device) / 1e9


def decode_gbps(scale: Scale, device: torch.device, kv_dtype: torch.dtype | None) -> float:
    """Bytes of keys and values of all sequences, by the time of one layer's attention."""
    dtype = scale.dtype
    num_seqs, length = scale.decode_seqs, scale.decode_tokens
    backend = _make_backend(device, dtype, kv_dtype or dtype, num_seqs * length)
    lens = np.full(num_seqs, length)
    plan = backend.plan(np.ones_like(lens), lens, _block_table(num_seqs, length))
    spec = backend.spec
    qkv = torch.randn(num_seqs, spec.qkv_size, dtype=dtype, device=device)
    rotary = _no_rotation(num_seqs, device)
    seconds = seconds_of(lambda: plan.attend(0, qkv, rotary), scale, device)
    return num_seqs * length * token_bytes(NUM_KV_HEADS, HEAD_DIM, spec.kv_dtype) / seconds / 1e9


def prefill_tflops(scale: Scale, device: torch.device) -> tuple[float, float]:
    """Of causal attention of one prompt: ours, and the fused one of torch."""
    dtype, length = scale.dtype, scale.prefill_tokens
    backend = _make_backend(device, dtype, dtype, length)
    lens = np.array([length])
    plan = backend.plan(lens, lens, _block_table(1, length))
    qkv = torch.randn(length, backend.spec.qkv_size, dtype=dtype, device=device)
    rotary = _no_rotation(length, device)
    ours = seconds_of(lambda: plan.attend(0, qkv, rotary), scale, device)
    heads = torch.randn(1, NUM_HEADS + 2 * NUM_KV_HEADS, length, HEAD_DIM, dtype=dtype)
    q, k, v = torch.split(heads.to(device), [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    # As many key heads as queries have: the fused work asks for that.
    k, v = (kv.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for kv in (k, v))
    chosen = SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH

    def attend() -> torch.Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    theirs = seconds_of(attend, scale, device)
    # Two products of two operations each, over half of all pairs.
    operations = 2 * 2 * NUM_HEADS * HEAD_DIM * length * length / 2
    return operations / ours / 1e12, operations / theirs / 1e12


def seconds_of(run: Callable[[], object], scale: Scale, device: torch.device) -> float:
    """The median of several runs, after three that do not count.

    On a GPU of recorded runs, as decode steps are: time between launches does not count.
    """
    for _ in range(3):
        run()
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RECORDED):
            run()
    times = []
    for _ in range(scale.repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / _RECORDED)
    return float(np.median(times))


def _make_backend(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, num_tokens: int
) -> AttentionBackend:
    backend = make_backend(
        AttentionSpec(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            windows=(0,),
            scale=HEAD_DIM**-0.5,
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=BLOCK_SIZE,
            device=device,
        )
    )
    backend.allocate(-(-num_tokens // BLOCK_SIZE) + 1)
    for cache in backend.kv_caches:
        for tensor in cache.tensors:
            # Numbers that are none would be slower or faster nowhere, but every sum would be none.
            tensor.fill_(0 if tensor.dtype in (torch.uint8, torch.int8) else 0.5)
    return backend


def _block_table(num_seqs: int, length: int) -> np.ndarray:
    """In an order as that of an engine that has run for long."""
    per_seq = -(-length // BLOCK_SIZE)
    order = np.random.default_rng(0).permutation(num_seqs * per_seq) + 1
    return order.reshape(num_seqs, per_seq).astype(np.int32)


def _no_rotation(num_tokens: int, device: torch.device) -> Rotary:
    ones = torch.ones(num_tokens, 1, HEAD_DIM, device=device)
    return Rotary(ones, torch.zeros_like(ones))
