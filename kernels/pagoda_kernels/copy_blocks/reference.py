"""The specification of copy_blocks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_blocks_reference(
    tensors: Sequence[torch.Tensor], sources: Sequence[int], targets: Sequence[int]
) -> None:
    """See `pagoda_kernels.copy_blocks.copy_blocks`."""
    device = tensors[0].device
    from_blocks = torch.tensor(sources, device=device)
    to_blocks = torch.tensor(targets, device=device)
    for tensor in tensors:
        tensor.index_copy_(0, to_blocks, tensor.index_select(0, from_blocks))
