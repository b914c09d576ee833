"""A layer's tensors, and which part of which of a checkpoint's tensors goes where in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among those that divide every layer between them."""

    rank: int = 0
    size: int = 1

    def share(self, num_units: int) -> range:
        """This rank's of so many units; if they are fewer than ranks, several have the same one."""
        count = max(1, num_units // self.size)
        first = self.rank * num_units // self.size
        return range(first, first + count)


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
    """

    parts: Sequence[Part]
    in_features: int = 0
    cut: Axis | None = None

    def whole(self, axis: Axis, part: Part) -> range:
        return range(part.size if axis is Axis.OUTPUT else self.in_features)

    def own(self, axis: Axis, part: Part, parallel: TensorParallel) -> range:
        """The outputs or inputs of a part that a rank holds."""
        whole = self.whole(axis, part)
        if axis is not self.cut:
            return whole
        num_heads = (part.num_heads if axis is Axis.OUTPUT else 0) or len(whole)
        heads, head_size = parallel.share(num_heads), len(whole) // num_heads
        return range(heads.start * head_size, heads.stop * head_size)


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
        self._slots: dict[str, _Slot] = {}
        first = dict.fromkeys(Axis, 0)
        for part in layout.parts:
            shape, source, target = [], [], []
            for dim in dims:
                own = layout.own(dim.axis, part, parallel)
                size = len(own) // dim.per
                start = own.start // dim.per
                begin = first[dim.axis] if dim.axis is Axis.OUTPUT else 0
                shape.append(len(layout.whole(dim.axis, part)) // dim.per)
                source.append(slice(start, start + size))
                target.append(slice(begin, begin + size))
                first[dim.axis] = begin + size
            self._slots[part.name] = _Slot(tuple(shape), tuple(source), tuple(target))
        self.data = torch.empty([first[dim.axis] for dim in dims], dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def shards(self) -> dict[str, Shard]:
        """By name of the part: what fills which part of this."""
        # Not kept: they hold the parameter, which must go when its last user does.
        return {name: Shard(self, slot) for name, slot in self._slots.items()}

    def store(self, target: tuple[slice, ...], tensor: torch.Tensor) -> None:
        """Take over a part; here, and not later, what is stored otherwise is converted."""
        self.data[target].copy_(tensor)


@dataclass(frozen=True, slots=True)
class _Slot:
    shape: tuple[int, ...]
    """Of the checkpoint's tensor."""
    source: tuple[slice, ...]
    """Which part of it this rank holds."""
    target: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that one of the checkpoint's tensors fills."""

    parameter: Parameter
    slot: _Slot

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        return self.slot.shape

    def load(self, tensor: torch.Tensor) -> None:
        """Args: tensor: whole; mapped from its file, only this rank's part of it is read."""
        self.parameter.store(self.slot.target, tensor[self.slot.source])
