"""Turn the scheduler's rows into the tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionBackend
from pagoda_kernels.transfer import all_to_device
from pagoda_runtime.execution.row_tables import RowTables
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
    sampled_rows_on_device: torch.Tensor
    """The same, int64."""
    first_tokens: list[int]
    """For each row, the index of its first token."""


def prepare_step(
    rows: Sequence[ScheduledRow],
    row_tables: RowTables,
    attention: AttentionBackend,
    last_tokens: torch.Tensor | None = None,
) -> PreparedStep:
    """Lay out the rows' tokens one after the other, and plan their attention.

    Args:
        last_tokens: int64, on the device: of each row of the step before, what it has sampled.
            Without it no row may have a token in flight.
    """
    query_lens = np.array([len(row.token_ids) for row in rows])
    seq_lens = np.array([row.start for row in rows]) + query_lens
    ends = np.cumsum(query_lens)
    token_ids = np.fromiter(chain.from_iterable([row.token_ids for row in rows]), dtype=np.int64)
    positions = np.arange(len(token_ids)) + np.repeat(seq_lens - ends, query_lens)
    most_blocks = max([len(row.block_table) for row in rows])
    table = row_tables.gather(row_tables.place(rows), most_blocks)
    plan = attention.plan(query_lens, seq_lens, table)
    sampled = [index for index, row in enumerate(rows) if row.sampling_params is not None]
    in_flight = [index for index, row in enumerate(rows) if row.row_in_flight is not None]
    sources = [rows[index].row_in_flight for index in in_flight]
    sampling, waiting, awaited = (
        np.array(some, np.int64) for some in (sampled, in_flight, sources)
    )
    tokens, token_positions, sampled_tokens, sampled_rows, unknown, known = all_to_device(
        [token_ids, positions, ends[sampling] - 1, sampling, ends[waiting] - 1, awaited],
        attention.spec.device,
    )
    if last_tokens is not None:
        tokens.index_copy_(0, unknown, last_tokens.index_select(0, known))
    return PreparedStep(
        StepInput(tokens, token_positions, plan),
        sampled_tokens,
        sampled,
        sampled_rows,
        (ends - query_lens).tolist(),
    )
