"""Steps in which every row computes one token and samples the next, on a device of its own pace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionBackend
from pagoda_kernels.transfer import all_to_device
from pagoda_runtime.execution.row_tables import RowTables
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.model import Model
from pagoda_runtime.platforms import Record, Replay

# Numbers of a row beside its blocks: its token, the row of the step before that samples it or -1,
# and its position.
_NUM_FIELDS = 3
_LARGEST_GRAPH = 512


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the steps that are recorded, ascending; others are padded to the next."""
    most = min(max_num_seqs, _LARGEST_GRAPH)
    return sorted({min(size, most) for size in (1, 2, 4, 8, *range(16, most + 16, 16))})


def is_decode_step(rows: Sequence[ScheduledRow]) -> bool:
    """Whether each row has one token, and samples the next and nothing else."""
    return all(
        row.sampling_params is not None and len(row.token_ids) == 1 and not row.prompt_targets
        for row in rows
    )


class DecodeSteps:
    """Runs such steps: everything from the rows' numbers to the logits is done by the device.

    The numbers of a step go to the device in one copy, into tensors that stay where they are. What
    follows has fixed shapes for a number of rows, so it can be recorded, and replayed by one call.
    A row that only fills up the number is of block 0, which nobody reads.
    """

    def __init__(self, model: Model, attention: AttentionBackend, row_tables: RowTables) -> None:
        device, most = attention.spec.device, row_tables.padding_place
        self.model, self.attention = model, attention
        self.row_tables = row_tables
        self.last_tokens = torch.zeros(most, dtype=torch.int64, device=device)
        """Of each row of the step before, of whatever kind, what it has sampled."""
        self._fields = torch.zeros(_NUM_FIELDS * most, dtype=torch.int32, device=device)
        columns = row_tables.table.shape[1]
        self._table = torch.zeros((most, columns), dtype=torch.int32, device=device)
        self._sizes: list[int] = []
        self._replays: dict[int, Replay] = {}
        self._logits = torch.empty(0, device=device)

    def record(self, record: Record, sizes: Sequence[int] | None = None) -> None:
        """Record steps, by default of all sizes; they share memory, so the largest comes first."""
        # Rows of block 0, as fields of other sizes would not be.
        self._fields.zero_()
        self._table.zero_()
        for size in sorted(sizes or graph_sizes(self.row_tables.padding_place), reverse=True):
            # Once before: what is compiled or allocated at the first call must not be recorded.
            logits = self._compute(size)
            if not self._replays:
                self._logits = torch.empty_like(logits)
            self._replays[size] = record(partial(self._compute_into, size))
        self._sizes = sorted(self._replays)

    def run(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """[num_rows, vocab_size] logits; the next step may overwrite them."""
        num_rows = len(rows)
        size = next((size for size in self._sizes if size >= num_rows), None)
        self._send(rows, size or num_rows)
        if size is None:
            return self._compute(num_rows)
        self._replays[size]()
        return self._logits[:num_rows]

    def _send(self, rows: Sequence[ScheduledRow], size: int) -> None:
        """Bring the rows' numbers, and padding up to the size, into the tensors that stay."""
        num_rows = len(rows)
        places = np.full(size, self.row_tables.padding_place)
        places[:num_rows] = self.row_tables.place(rows)
        table = self.row_tables.gather(places, max([len(row.block_table) for row in rows]))
        fields = np.zeros((_NUM_FIELDS, size), dtype=np.int32)
        fields[1] = -1
        fields[0, :num_rows] = [row.token_ids[0] for row in rows]
        fields[1, :num_rows] = [
            -1 if row.row_in_flight is None else row.row_in_flight for row in rows
        ]
        fields[2, :num_rows] = [row.start for row in rows]
        sent_fields, sent_table = all_to_device((fields.reshape(-1), table), self._table.device)
        self._fields[: fields.size].copy_(sent_fields)
        self._table[:size, : table.shape[1]].copy_(sent_table)

    def _compute(self, size: int) -> torch.Tensor:
        token_ids, sources, starts = self._fields[: _NUM_FIELDS * size].view(_NUM_FIELDS, size)
        sampled = self.last_tokens.index_select(0, sources.clamp_min(0))
        positions = starts.long()
        plan = self.attention.plan_on_device(starts + 1, self._table[:size])
        tokens = torch.where(sources < 0, token_ids, sampled)
        hidden = self.model(StepInput(tokens, positions, plan))
        return self.model.logits(hidden)

    def _compute_into(self, size: int) -> None:
        self._logits[:size].copy_(self._compute(size))
