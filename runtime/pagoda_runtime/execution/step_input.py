"""Turn the scheduler's rows into the tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionMetadata, GatherBuffer, HeadShape
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.decoder import StepInput


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


def prepare_step(
    rows: Sequence[ScheduledRow],
    *,
    block_size: int,
    heads: HeadShape,
    windows: Sequence[int],
    buffer: GatherBuffer | None = None,
    is_deterministic: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> PreparedStep:
    """Lay out the rows' tokens one after the other, decode rows first, shortest first."""
    order = sorted(
        range(len(rows)), key=lambda index: (len(rows[index].token_ids) > 1, rows[index].start)
    )
    ordered = [rows[index] for index in order]
    query_lens = [len(row.token_ids) for row in ordered]
    seq_lens = [row.start + len(row.token_ids) for row in ordered]
    block_table = _block_table([row.block_table for row in ordered])
    token_ids = np.fromiter((t for row in ordered for t in row.token_ids), dtype=np.int64)
    first_tokens = np.cumsum(query_lens) - query_lens
    seqs = np.repeat(np.arange(len(ordered)), query_lens)
    starts = np.array([row.start for row in ordered], dtype=np.int64)
    positions = np.arange(len(token_ids)) + (starts - first_tokens)[seqs]
    slot_mapping = _slots(block_table, seqs, positions, block_size)
    metadata = AttentionMetadata.build(
        query_lens,
        seq_lens,
        block_table,
        block_size=block_size,
        heads=heads,
        windows=windows,
        dtype=dtype,
        device=device,
        buffer=buffer,
        is_deterministic=is_deterministic,
    )
    sampled = [index for index, row in enumerate(rows) if row.sampling_params is not None]
    row_starts = np.empty(len(rows), dtype=np.int64)
    row_starts[order] = first_tokens
    last_tokens = row_starts + np.array([len(row.token_ids) for row in rows]) - 1
    return PreparedStep(
        StepInput(
            torch.from_numpy(token_ids).to(device),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(slot_mapping).to(device),
            metadata,
        ),
        torch.from_numpy(last_tokens[sampled]).to(device),
        sampled,
        row_starts.tolist(),
    )


def _slots(
    block_table: np.ndarray, seqs: np.ndarray, positions: np.ndarray, block_size: int
) -> np.ndarray:
    """[num_tokens] int64: the cache slot of each token, from its sequence and position."""
    blocks, offsets = np.divmod(positions, block_size)
    slots: np.ndarray = block_table[seqs, blocks].astype(np.int64) * block_size + offsets
    return slots


def _block_table(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """[num_rows, longest] int32, padded with block 0."""
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded
