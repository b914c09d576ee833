"""What an engine on a GPU would launch, from the engine's own code on tensors without data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from gpu.shapes import shortened
from pagoda_kernels.launch import Launch, LaunchRecorder
from pagoda_kernels.paged_attention import make_backend
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.memory import make_attention
from pagoda_runtime.execution.row_tables import RowTables
from pagoda_runtime.execution.step_input import prepare_step
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.registry import make_model
from pagoda_runtime.quantization import get_linear_method
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.sampling_params import SamplingParams

KV_DTYPES = {
    "auto": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
BLOCK_SIZES = (16, 32)

Chunk = tuple[int, int]
"""Tokens of a sequence that are there, and those that a step adds."""

_LONG = 2500
STEPS: Sequence[Sequence[Chunk]] = (
    *([(_LONG, 1)] * num_rows for num_rows in (1, 2, 4, 8, 16, 17, 64, 256)),
    [(0, 1)],
    [(0, 7)],
    [(0, 2048)],
    [(512, 100), (0, 300)],
    [(_LONG, 1)] * 3 + [(0, 2000)],
)


def record(
    shape: str, kv_dtypes: Iterable[str], block_sizes: Iterable[int]
) -> Iterator[tuple[str, int, list[Launch]]]:
    """KV dtype, block size and launches of steps of decode, of prompts, and of both."""
    device = torch.device("cuda")
    with LaunchRecorder() as recorder, torch.no_grad():
        method = get_linear_method(None, torch.bfloat16, device)
        model = make_model(shortened(shape), Placement(torch.bfloat16, device, method))
        model.after_loading()
        for kv_dtype, block_size in itertools.product(kv_dtypes, block_sizes):
            spec = make_attention(EngineConfig(model=shape, block_size=block_size), model).spec
            attention = make_backend(dataclasses.replace(spec, kv_dtype=KV_DTYPES[kv_dtype]))
            attention.allocate(1024)
            attention.copy_blocks([1], [2])
            for step in STEPS:
                prepared = prepare_step(_rows(step, block_size), RowTables(256, 256), attention)
                hidden = model(prepared.step_input)
                model.logits(hidden.index_select(0, prepared.sampled_tokens))
            yield kv_dtype, block_size, recorder.launches
            recorder.launches = []


def _rows(step: Sequence[Chunk], block_size: int) -> list[ScheduledRow]:
    return [
        ScheduledRow(
            request_id=str(index),
            token_ids=[0] * num_new,
            start=num_old,
            block_table=[1] * -(-(num_old + num_new) // block_size),
            sampling_params=SamplingParams(temperature=0.0),
        )
        for index, (num_old, num_new) in enumerate(step)
    ]
