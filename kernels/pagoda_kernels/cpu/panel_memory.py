"""Memory of matrices in panels: huge pages, one matrix behind the other.

A step reads all matrices from end to end. In pages of 4 KiB the processor spends a part of that on
looking up addresses; and a matrix that is allocated alone has small pages at both its ends, or
leaves a gap of up to a huge page.
"""

from __future__ import annotations

import math
import mmap

import torch

from pagoda_kernels.cpu.panels import VECTOR_BYTES

_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 256 << 20
"""What is mapped at a time; it takes memory only where it is written to."""


class PanelMemory:
    """Hands out parts of large mappings, which stay as long as a tensor lies in them."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Beginning at a multiple of 64 bytes."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._chunk):
            self._chunk = _map(max(num_bytes, _CHUNK_BYTES))
        part = self._chunk[:num_bytes]
        self._chunk = self._chunk[num_bytes + -num_bytes % VECTOR_BYTES :]
        return part.view(dtype).view(shape)


def _map(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8, zeros, from the beginning of a huge page on."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(mapping, dtype=torch.uint8)
    return numbers[-numbers.data_ptr() % _HUGE_PAGE_BYTES :][:num_bytes]


PANEL_MEMORY = PanelMemory()
"""Of this process: that matrices share it is its use."""
