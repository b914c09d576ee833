"""What an engine on a GPU would launch, from the engine's own code on tensors without data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from gpu.shapes import shortened
from pagoda_kernels.grouped_linear import GroupedShape, make_grouped_linear
from pagoda_kernels.launch import Launch, LaunchRecorder
from pagoda_kernels.scaled_linear import Rounding, ScaledShape, make_scaled_linear
from pagoda_runtime.execution.rehearsal import absent_runner
from pagoda_runtime.ipc.messages import BlockCopy, ScheduledRow
from pagoda_runtime.sampling_params import SamplingParams

KV_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2", "int8")
BLOCK_SIZES = (16, 32)

Chunk = tuple[int, int]
"""Tokens of a sequence that are there, and those that a step adds."""

# Tokens that are there, and their kernels, are those of a deep sequence, and of one that begins.
_DEEP = 2500
STEPS: Sequence[Sequence[Chunk]] = (
    *([(_DEEP, 1)] * num_rows for num_rows in (1, 2, 17, 256)),
    [(0, 1)],
    [(0, 7)],
    [(0, 100)],
    [(0, 2048)],
    [(512, 100), (0, 300)],
    [(_DEEP, 1)] * 3 + [(0, 2000)],
    [(_DEEP, 1)] * 100 + [(1000, 64)],
)
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = (
    GREEDY,
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, logprobs=5),
    SamplingParams(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.5),
    SamplingParams(temperature=1.0, logit_bias={5: 1.0}, min_tokens=3, allowed_token_ids=(5, 6)),
)

# Bits, group size, and whether there are no zeros.
GROUPED = (
    (2, 128, False),
    (3, 128, False),
    (4, 128, False),
    (4, 32, False),
    (4, 32, True),
    (5, 32, True),
    (6, 16, True),
    (6, 128, True),
    (8, 128, False),
    (8, 4096, True),
)
SCALED = (
    (torch.float8_e4m3fn, 128, Rounding.NONE),
    (torch.float8_e4m3fn, 4096, Rounding.DYNAMIC),
    (torch.float8_e4m3fn, 128, Rounding.DYNAMIC),
    (torch.int8, 4096, Rounding.DYNAMIC),
)
PRODUCT_ROWS = (1, 16, 32, 64, 100, 2048)


def record(
    shape: str, kv_dtypes: Iterable[str], block_sizes: Iterable[int]
) -> Iterator[tuple[str, int, list[Launch]]]:
    """KV dtype, block size and launches of the start, of decode, of prompts, and of both."""
    for kv_dtype, block_size in itertools.product(kv_dtypes, block_sizes):
        with absent_runner(
            shortened(shape), max_model_len=4096, kv_cache_dtype=kv_dtype, block_size=block_size
        ) as (runner, recorder):
            runner.record_graphs()
            for step in STEPS:
                runner.submit(make_rows(step, [GREEDY], block_size))
            # Of a step's rows some are sampled plainly and some are not.
            for num_rows in (1, 20, 256):
                runner.submit(make_rows([(10, 1)] * num_rows, SAMPLED[-num_rows:], block_size))
            runner.submit(make_rows([(10, 1)], [GREEDY], block_size), [BlockCopy(1, 2)])
            runner.submit(
                make_rows([(10, 1)], [GREEDY], block_size), [BlockCopy(1, 2), BlockCopy(3, 4)]
            )
        yield kv_dtype, block_size, recorder.launches


def record_products() -> Iterator[tuple[str, list[Launch]]]:
    """What products with matrices of each kind launch, for every number of rows that has its own
    kernels; matrices without data are made as a loader makes them, and never filled.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    inputs, outputs = 4096, 14336
    for bits, group_size, is_symmetric in GROUPED:
        grouped = GroupedShape(outputs, inputs, bits, group_size)
        with LaunchRecorder() as recorder:
            product = make_grouped_linear(
                grouped, dtype=dtype, device=device, activation="silu", is_symmetric=is_symmetric
            )
            product.finish(torch.empty(outputs, dtype=dtype, device=device))
            for num_rows in PRODUCT_ROWS:
                product(torch.empty(num_rows, inputs, dtype=dtype, device=device))
        zeros = "" if is_symmetric else " with zeros"
        yield f"int{bits} in groups of {group_size}{zeros}", recorder.launches
    for kind, group_size, rounding in SCALED:
        scaled = ScaledShape(outputs, inputs, kind, group_size)
        with LaunchRecorder() as recorder:
            of_bytes = make_scaled_linear(scaled, rounding, dtype=dtype, device=device)
            of_bytes.finish(None)
            for num_rows in PRODUCT_ROWS:
                of_bytes(torch.empty(num_rows, inputs, dtype=dtype, device=device))
        name = str(kind).removeprefix("torch.")
        yield f"{name} in groups of {group_size}, rounding {rounding.value}", recorder.launches


def make_rows(
    step: Sequence[Chunk], params: Sequence[SamplingParams], block_size: int
) -> list[ScheduledRow]:
    """The rows of a step; the last of each has its tokens sampled by one of the params in turn."""
    return [
        ScheduledRow(
            request_id=str(index),
            token_ids=[5] * num_new,
            start=num_old,
            block_table=[1] * -(-(num_old + num_new) // block_size),
            sampling_params=params[index % len(params)],
            seeds=(index,),
            num_prompt_tokens=num_old,
            num_output_tokens=num_new,
            history=[5] * (num_old + num_new),
        )
        for index, (num_old, num_new) in enumerate(step)
    ]
