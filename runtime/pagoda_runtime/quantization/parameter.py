"""A layer's tensors, and which part of which of a checkpoint's tensors goes where in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from pagoda_runtime.parallel import TensorParallel


class Axis(Enum):
    """What a dimension of a tensor runs over; a matrix is [outputs, inputs]."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a tensor: `per` outputs or inputs of the matrix share one element."""

    axis: Axis
    per: int = 1


OUTPUT, INPUT = Dim(Axis.OUTPUT), Dim(Axis.INPUT)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the checkpoint's matrices that a layer stacks along the outputs."""

    name: str
    """Its module in the checkpoint, beside the layer; "": the layer's own."""
    size: int
    """Outputs."""
    num_heads: int = 0
    """Of an output cut for ranks: it is cut between heads only; 0: anywhere."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The matrices that a layer stacks, as all ranks together have them.

    Args:
        cut: what is divided between the ranks; None: every rank holds all.
        is_padded: whether a cut into unequal shares is allowed; all ranks hold as much as the
            first, and the last ones fill up with zeros.
    """

    parts: Sequence[Part]
    in_features: int = 0
    cut: Axis | None = None
    is_padded: bool = False

    def size(self, axis: Axis, part: Part) -> int:
        return part.size if axis is Axis.OUTPUT else self.in_features

    def own(self, axis: Axis, part: Part, parallel: TensorParallel) -> range:
        """The outputs or inputs of a part that a rank holds."""
        size = self.size(axis, part)
        if axis is not self.cut:
            return range(size)
        if self.is_padded:
            held = self.held(axis, part, parallel)
            return range(size)[parallel.rank * held :][:held]
        num_heads = (part.num_heads if axis is Axis.OUTPUT else 0) or size
        heads, head_size = parallel.share(num_heads), size // num_heads
        return range(heads.start * head_size, heads.stop * head_size)

    def held(self, axis: Axis, part: Part, parallel: TensorParallel) -> int:
        """How many outputs or inputs of a part a rank has room for."""
        if self.is_padded and axis is self.cut:
            return -(-self.size(axis, part) // parallel.size)
        return len(self.own(axis, part, parallel))


class Parameter:
    """A tensor of a layer, of which a rank holds its share.

    Args:
        dims: what each dimension of the tensor runs over.
    """

    def __init__(
        self,
        layout: Layout,
        dims: Sequence[Dim],
        *,
        dtype: torch.dtype,
        device: torch.device,
        parallel: TensorParallel,
    ) -> None:
        self._layout, self._dims, self._parallel = layout, dims, parallel
        parts = layout.parts
        held = {
            Axis.OUTPUT: sum(layout.held(Axis.OUTPUT, part, parallel) for part in parts),
            Axis.INPUT: layout.held(Axis.INPUT, parts[0], parallel),
        }
        shape = [held[dim.axis] // dim.per for dim in dims]
        make = torch.zeros if layout.is_padded else torch.empty
        self.data = make(shape, dtype=dtype, device=device)

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """The name of each part, and what it fills. Not kept: they would keep the parameter."""
        num_outputs = 0
        for part in self._layout.parts:
            shape, source, target = [], [], []
            for dim in self._dims:
                own = self._layout.own(dim.axis, part, self._parallel)
                first = num_outputs if dim.axis is Axis.OUTPUT else 0
                shape.append(self._layout.size(dim.axis, part) // dim.per)
                source.append(slice(own.start // dim.per, own.stop // dim.per))
                target.append(slice(first // dim.per, (first + len(own)) // dim.per))
            num_outputs += self._layout.held(Axis.OUTPUT, part, self._parallel)
            yield part.name, Shard(self, tuple(shape), tuple(source), tuple(target))

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def store(self, target: tuple[slice, ...], tensor: torch.Tensor) -> None:
        """Take over a part; here, and not later, what is stored otherwise is converted."""
        self.data[target].copy_(tensor)


class StoredTensor(Protocol):
    """A tensor in its file, as safetensors' `get_slice` gives it."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """Of its file, mapped, not copied."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that one of the checkpoint's tensors fills."""

    parameter: Parameter
    shape: tuple[int, ...]
    """Of the checkpoint's tensor."""
    source: tuple[slice, ...]
    """Which part of it this rank holds."""
    target: tuple[slice, ...]

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """Take this rank's part of the checkpoint's tensor, and return it; no other is read."""
        piece = tensor[self.source]
        self.parameter.store(self.target, piece)
        return piece
