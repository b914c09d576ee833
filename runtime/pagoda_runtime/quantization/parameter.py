"""A layer's tensors, and which part of which of a checkpoint's tensors goes where in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
    """A dimension of a tensor: `per` outputs or inputs of the matrix share `words` elements.

    axis: None: of neither; every rank has all of it, whatever its size.
    is_whole: every rank has all of it.
    """

    axis: Axis | None
    per: int = 1
    words: int = 1
    is_whole: bool = False

    def size(self, count: int) -> int:
        """Elements of so many outputs or inputs."""
        return -(-count // self.per) * self.words

    def span(self, own: range) -> slice:
        """The elements that these outputs or inputs have a part of."""
        return slice(own.start // self.per * self.words, self.size(own.stop))


OUTPUT, INPUT = Dim(Axis.OUTPUT), Dim(Axis.INPUT)
ANY = Dim(None)
ANY_SIZE = -1
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        dims: what each dimension of the tensor runs over: OUTPUT or INPUT.
    """

    dtypes: Collection[torch.dtype] = FLOATS
    """That the checkpoint may have it in."""
    is_optional = False
    """Whether the checkpoint may be without."""

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
        shape = [held[dim.axis] for dim in dims if dim.axis]
        make = torch.zeros if layout.is_padded else torch.empty
        self.data = make(shape, dtype=dtype, device=device)

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """The name of each part, and what it fills. Not kept: they would keep the parameter."""
        num_outputs = 0
        for part in self._layout.parts:
            shape, source, target = [], [], []
            for dim in self._dims:
                assert dim.axis
                own = self._layout.own(dim.axis, part, self._parallel)
                first = num_outputs if dim.axis is Axis.OUTPUT else 0
                shape.append(self._layout.size(dim.axis, part))
                source.append(slice(own.start, own.stop))
                target.append(slice(first, first + len(own)))
            num_outputs += self._layout.held(Axis.OUTPUT, part, self._parallel)
            yield part.name, Shard(self, tuple(shape), tuple(source), tuple(target))

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def store(self, target: tuple[slice, ...], tensor: torch.Tensor) -> None:
        """Take over a part; here, and not later, what is stored otherwise is converted."""
        self.data[target].copy_(tensor)


class StoredParameter(Parameter):
    """A layer's tensors as the checkpoint has them: one for each part, and not stacked.

    A rank has of a tensor every element that its outputs and inputs have a part of.

    Args:
        dims: what each dimension of the tensors runs over; None: of any shape, taken whole.
        dtypes: that the checkpoint may have it in.
        is_optional: whether it may be absent.
    """

    def __init__(
        self,
        layout: Layout,
        dims: Sequence[Dim] | None,
        *,
        dtypes: Collection[torch.dtype],
        device: torch.device,
        parallel: TensorParallel,
        is_optional: bool = False,
    ) -> None:
        self._layout, self._dims, self._parallel = layout, dims or (), parallel
        self._is_any, self._device = dims is None, device
        self.dtypes, self.is_optional = dtypes, is_optional
        self._tensors: list[torch.Tensor | None] = [None] * len(layout.parts)

    def shards(self) -> Iterator[tuple[str, Shard]]:
        for index, part in enumerate(self._layout.parts):
            shape, source = [], []
            for dim in self._dims:
                if dim.axis is None:
                    shape.append(ANY_SIZE)
                    source.append(slice(None))
                    continue
                size = self._layout.size(dim.axis, part)
                own = self._layout.own(dim.axis, part, self._parallel)
                shape.append(dim.size(size))
                source.append(dim.span(range(size) if dim.is_whole else own))
            whole = self._is_any
            target = (slice(index, index + 1),)
            yield part.name, Shard(self, tuple(shape), tuple(source), target, is_any=whole)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    def store(self, target: tuple[slice, ...], tensor: torch.Tensor) -> None:
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        self._tensors[target[0].start] = own.copy_(tensor)

    def take(self, index: int) -> torch.Tensor | None:
        """A part's tensor, which is not kept here any longer; None: the checkpoint has none."""
        tensor, self._tensors[index] = self._tensors[index], None
        return tensor


class JoinedParameter(Parameter):
    """Tensors of one name for parts of a layer that are stored in several ways."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters

    def shards(self) -> Iterator[tuple[str, Shard]]:
        for parameter in self._parameters:
            yield from parameter.shards()

    @property
    def num_bytes(self) -> int:
        return sum(parameter.num_bytes for parameter in self._parameters)


class StoredTensor(Protocol):
    """A tensor in its file, as safetensors' `get_slice` gives it."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """Of its file, mapped, not copied."""


class WrongDtypeError(Exception):
    """A tensor in a dtype that its parameter does not take; the message says which."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that one of the checkpoint's tensors fills."""

    parameter: Parameter
    shape: tuple[int, ...]
    """Of the checkpoint's tensor; ANY_SIZE where it may have any."""
    source: tuple[slice, ...]
    """Which part of it this rank holds."""
    target: tuple[slice, ...]
    is_any: bool = False
    """Whether the tensor may have any shape, and is taken whole."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the checkpoint's tensor may have this shape."""
        if self.is_any:
            return True
        sizes = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(a in (b, ANY_SIZE) for a, b in sizes)

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """Take this rank's part of the checkpoint's tensor, and return it; no other is read.

        Raises: WrongDtypeError.
        """
        piece = tensor[... if self.is_any else self.source]
        if piece.dtype not in self.parameter.dtypes:
            found, *known = (
                str(dtype).removeprefix("torch.") for dtype in (piece.dtype, *self.parameter.dtypes)
            )
            raise WrongDtypeError(f"{found} instead of {' or '.join(known)}")
        self.parameter.store(self.target, piece)
        return piece
