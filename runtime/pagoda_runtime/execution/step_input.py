"""Turn the scheduler's rows into the tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionBackend
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.layers.step_input import StepInput


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's tensors, and which of its tokens are sampled."""

    step_input: StepInput
    sampled_tokens: torch.Tensor
    """int64: indices of the tokens whose logits are wanted, in the rows' order."""
    sampled_rows: list[int]
    """Indices of the rows that they belong to."""
    first_tokens: list[int]
    """For each row, the index of its first token."""


def prepare_step(rows: Sequence[ScheduledRow], attention: AttentionBackend) -> PreparedStep:
    """Lay out the rows' tokens one after the other, and plan their attention."""
    query_lens = np.array([len(row.token_ids) for row in rows])
    starts = np.array([row.start for row in rows])
    ends = np.cumsum(query_lens)
    token_ids = np.fromiter((t for row in rows for t in row.token_ids), dtype=np.int64)
    positions = np.arange(len(token_ids)) + np.repeat(starts + query_lens - ends, query_lens)
    plan = attention.plan(query_lens, starts + query_lens, _block_table(rows))
    sampled = [index for index, row in enumerate(rows) if row.sampling_params is not None]
    device = attention.spec.device
    return PreparedStep(
        StepInput(
            torch.from_numpy(token_ids).to(device), torch.from_numpy(positions).to(device), plan
        ),
        torch.from_numpy(ends[sampled] - 1).to(device),
        sampled,
        (ends - query_lens).tolist(),
    )


def _block_table(rows: Sequence[ScheduledRow]) -> np.ndarray:
    """[num_rows, longest] int32, padded with block 0."""
    padded = np.zeros((len(rows), max(len(row.block_table) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row.block_table)] = row.block_table
    return padded
