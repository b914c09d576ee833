"""For tests of kernels: what Triton's interpreter moves, and matrices that come in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pagoda_kernels.quantized_linear import QuantizedLinear

_ROWS_AT_ONCE = 37
"""In pieces that no tile begins with."""


class Moves:
    """The addresses that kernels loaded from and stored to, in their order."""

    def __init__(self) -> None:
        self.loaded_bytes = 0
        self._loads: list[np.ndarray] = []
        self._stores: list[np.ndarray] = []

    def loads(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each number of a contiguous tensor was loaded."""
        return _count(self._loads, tensor)

    def stores(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each number of a contiguous tensor was stored."""
        return _count(self._stores, tensor)


def _count(parts: list[np.ndarray], tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous()
    addresses = np.concatenate(parts) if parts else np.empty(0, np.int64)
    indices = (addresses.astype(np.int64) - tensor.data_ptr()) // tensor.itemsize
    inside = indices[(indices >= 0) & (indices < tensor.numel())]
    return torch.from_numpy(np.bincount(inside, minlength=tensor.numel())).view(tensor.shape)


@contextlib.contextmanager
def watch_moves() -> Iterator[Moves]:
    """What the kernels that are interpreted meanwhile load and store."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    moves, load, store = Moves(), Builder.create_masked_load, Builder.create_masked_store

    def watched_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        addresses = ptrs.data[mask.data]
        moves._loads.append(addresses)
        moves.loaded_bytes += addresses.size * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *others)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        moves._stores.append(ptrs.data[mask.data])
        return store(self, ptrs, value, mask, *others)

    Builder.create_masked_load, Builder.create_masked_store = watched_load, watched_store
    try:
        yield moves
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


def fill_linear(
    linear: QuantizedLinear[Any],
    matrix: Any,
    bias: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Piece by piece; matrix: `Grouped` or `Scaled`."""
    for first in range(0, len(matrix[0]), _ROWS_AT_ONCE):
        piece = slice(first, first + _ROWS_AT_ONCE)
        linear.fill(
            first,
            type(matrix)(*(None if part is None else part[piece].to(device) for part in matrix)),
        )
    linear.finish(None if bias is None else bias.to(device))
