"""copy_blocks as one Triton kernel: a program for the same part of all blocks of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch
from pagoda_kernels.transfer import to_device

_WORD_BYTES = 4
# Words that a program copies, 16 for each thread of 8 warps; at least so many copies, as each power
# of two is a kernel of its own.
_WORDS, _NUM_WARPS, _LEAST_COPIES = 4096, 8, 16


def copy_blocks_triton(
    tensors: Sequence[torch.Tensor], sources: Sequence[int], targets: Sequence[int]
) -> None:
    """See `pagoda_kernels.copy_blocks.copy_blocks`."""
    num_words = [tensor[0].nbytes // _WORD_BYTES for tensor in tensors]
    if any(tensor[0].nbytes % _WORD_BYTES for tensor in tensors):
        raise ValueError(f"A block must have a multiple of {_WORD_BYTES} bytes.")
    # The tensors' addresses among them: one kernel for all, and one copy to the device.
    addresses = [0 if hasattr(tensor, "fake_mode") else tensor.data_ptr() for tensor in tensors]
    numbers = np.array([*addresses, *num_words, *sources, *targets], dtype=np.int64)
    copies = max(_LEAST_COPIES, triton.next_power_of_2(len(sources)))
    words = max(1, _WORDS // copies)
    launch(
        _copy_blocks_kernel,
        [triton.cdiv(max(num_words), words), len(tensors)],
        to_device(numbers, tensors[0].device),
        len(tensors),
        len(sources),
        COPIES=copies,
        WORDS=words,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _copy_blocks_kernel(
    numbers_ptr,
    num_tensors, num_copies,
    COPIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(1)
    address = tl.load(numbers_ptr + tensor)
    num_words = tl.load(numbers_ptr + num_tensors + tensor)
    copies = tl.arange(0, COPIES)[:, None]
    sources_ptr = numbers_ptr + 2 * num_tensors + copies
    sources = tl.load(sources_ptr, copies < num_copies, 0)
    targets = tl.load(sources_ptr + num_copies, copies < num_copies, 0)
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[None, :]
    inside = (copies < num_copies) & (words < num_words)
    blocks_ptr = address.to(tl.pointer_type(tl.int32))
    values = tl.load(blocks_ptr + sources * num_words + words, inside)
    # Another thread may write what this one reads.
    tl.debug_barrier()
    tl.store(blocks_ptr + targets * num_words + words, values, inside)
