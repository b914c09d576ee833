"""Blocks of several tensors copied to others of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda_kernels.copy_blocks.reference import copy_blocks_reference
from pagoda_kernels.launch import uses_triton


def copy_blocks(
    tensors: Sequence[torch.Tensor], sources: Sequence[int], targets: Sequence[int]
) -> None:
    """Copy block sources[i] to block targets[i] in every tensor.

    All blocks are read before any is written, so a target may be the source of another copy.

    Args:
        tensors: [num_blocks, …] each, contiguous, of one device.
    Raises: ValueError: the lengths differ, a target repeats, or a block does not exist.
    """
    if len(sources) != len(targets):
        raise ValueError(f"There are {len(sources)} sources and {len(targets)} targets.")
    if len(set(targets)) != len(targets):
        raise ValueError(f"targets {list(targets)} repeat a block.")
    num_blocks = len(tensors[0])
    for block in (*sources, *targets):
        if not 0 <= block < num_blocks:
            raise ValueError(f"Block {block} does not exist; the cache has {num_blocks}.")
    if uses_triton(tensors[0].device):
        from pagoda_kernels.copy_blocks.kernel import copy_blocks_triton

        copy_blocks_triton(tensors, sources, targets)
    else:
        copy_blocks_reference(tensors, sources, targets)
