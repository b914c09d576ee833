"""The specification of copy_blocks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_blocks_reference(
    kv_caches: Sequence[torch.Tensor], sources: Sequence[int], targets: Sequence[int]
) -> None:
    """See `pagoda_kernels.copy_blocks.copy_blocks`; nothing is checked here."""
    if not kv_caches:
        return
    from_blocks = torch.tensor(sources, device=kv_caches[0].device)
    to_blocks = torch.tensor(targets, device=kv_caches[0].device)
    for kv_cache in kv_caches:
        kv_cache.index_copy_(0, to_blocks, kv_cache.index_select(0, from_blocks))
