"""What one step's attention needs to know about its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pagoda_kernels.cpu.attention.layout import HeadShape, Layout
from pagoda_kernels.cpu.attention.plan import GatherPlan, make_plan, plan_singles


class GatherBuffer:
    """Memory for gathered keys and values, or partial sums, that all layers and steps use in turn.

    Fresh memory for each layer would have to be mapped by the kernel each time, and would push the
    weights out of the processor's cache.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def rows(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """[num_rows, ...] of the trailing shape, dtype and device of `like`; contents are stale."""
        wanted = num_rows * like[0].numel()
        memory = self._memory
        if memory.numel() < wanted or memory.dtype != like.dtype or memory.device != like.device:
            memory = self._memory = like.new_empty(wanted)
        return memory[:wanted].view(num_rows, *like.shape[1:])


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The sequences of one step. Those with one query token come first, shortest first.

    query_start_loc: [num_seqs + 1] int32, first query token of each sequence, then the total.
    seq_lens: [num_seqs] int32, tokens in the cache including this step's.
    block_table: [num_seqs, max_blocks] int32; entries past the last used block are not read.
    num_decodes: sequences with one query token.
    num_tokens: query tokens of all sequences; a step may have padding after them.
    heads, dtype: of the queries and of the cache that the step was laid out for.
    plans: for the CPU path, by sliding window (0: none); empty on other devices.
    buffer: for the CPU path.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    num_tokens: int
    heads: HeadShape
    dtype: torch.dtype
    plans: dict[int, GatherPlan] = field(default_factory=dict)
    buffer: GatherBuffer = field(default_factory=GatherBuffer)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_table: np.ndarray,
        *,
        block_size: int,
        heads: HeadShape,
        windows: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        buffer: GatherBuffer | None = None,
        is_deterministic: bool = False,
    ) -> AttentionMetadata:
        """Lay out one step.

        Args:
            query_lens, seq_lens: per sequence; sequences with one query token must come first,
                in ascending order of seq_lens.
            block_table: [num_seqs, max_blocks] int32 on the host.
            heads: of every layer.
            windows: the sliding windows of the model's layers, 0 for full attention.
            dtype: of the queries and the cache.
            buffer: pass the same one at each step, so that its memory is reused.
            is_deterministic: let the bits of a token's result depend on its own sequence alone,
                not on the step's other tokens nor on how prompts are cut; slower.
        """
        num_decodes = 0
        while num_decodes < len(query_lens) and query_lens[num_decodes] == 1:
            num_decodes += 1
        if 1 in query_lens[num_decodes:]:
            raise ValueError("Sequences with one query token must come before the others.")
        starts = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        plans = {}
        if device.type == "cpu":
            layout = Layout(
                query_lens=query_lens,
                seq_lens=seq_lens,
                starts=starts,
                block_table=block_table,
                block_size=block_size,
                heads=heads,
                num_decodes=num_decodes,
                num_threads=torch.get_num_threads(),
            )
            plans = _plan_windows(layout, windows, dtype, is_deterministic)
        return cls(
            query_start_loc=torch.from_numpy(starts).to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=torch.from_numpy(block_table).to(device),
            num_decodes=num_decodes,
            num_tokens=int(starts[-1]),
            heads=heads,
            dtype=dtype,
            plans=plans,
            buffer=GatherBuffer() if buffer is None else buffer,
        )


def _plan_windows(
    layout: Layout, windows: Sequence[int], dtype: torch.dtype, is_deterministic: bool
) -> dict[int, GatherPlan]:
    plan = plan_singles if is_deterministic else make_plan
    longest = max(layout.seq_lens, default=0)
    # A window that no sequence has outgrown is none, which saves a plan.
    limits = {window: window if window < longest else 0 for window in windows}
    by_limit = {limit: plan(layout, limit, dtype) for limit in set(limits.values())}
    return {window: by_limit[limit] for window, limit in limits.items()}
