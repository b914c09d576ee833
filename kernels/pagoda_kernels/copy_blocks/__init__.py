"""Copy whole blocks of the paged KV cache, for sequences that part after a common beginning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda_kernels.copy_blocks.reference import copy_blocks_reference


def copy_blocks(
    kv_caches: Sequence[torch.Tensor], *, sources: Sequence[int], targets: Sequence[int]
) -> None:
    """Copy block sources[i] to block targets[i] in every layer's cache, in place.

    All blocks are read before any is written, so a target may be the source of another copy.

    Args:
        kv_caches: one for each layer, [num_blocks, ...].
        targets: distinct.
    Raises: ValueError: the lengths differ, a target repeats, or a block does not exist.
    """
    if len(sources) != len(targets):
        raise ValueError(f"There are {len(sources)} sources and {len(targets)} targets.")
    if len(set(targets)) != len(targets):
        raise ValueError(f"targets {list(targets)} repeat a block.")
    num_blocks = min((len(kv_cache) for kv_cache in kv_caches), default=0)
    for block in (*sources, *targets):
        if not 0 <= block < num_blocks:
            raise ValueError(f"Block {block} does not exist; the cache has {num_blocks}.")
    copy_blocks_reference(kv_caches, sources, targets)
