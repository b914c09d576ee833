"""What all formats of quantized checkpoints have in common: tensors that are not stacked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pagoda_runtime.errors import FatalError
from pagoda_runtime.quantization.base import LinearMethod, Placement
from pagoda_runtime.quantization.parameter import (
    FLOATS,
    OUTPUT,
    Axis,
    Dim,
    Layout,
    Parameter,
    StoredParameter,
)
from pagoda_runtime.quantization.schemes import Scheme

S = TypeVar("S", bound=Scheme)
NUMBERS_AT_ONCE = 1 << 20
"""That are held in another form than the stored one and the final one."""
ROWS_AT_ONCE = 32
"""Of which pieces of a matrix are multiples."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One part of a layer: the outputs and inputs that a rank has of it, and what it loaded."""

    name: str
    """Of its module in the checkpoint."""
    outputs: range
    inputs: range
    size: tuple[int, int]
    """Outputs and inputs that all ranks have."""
    tensors: Mapping[str, torch.Tensor | None]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def row_scales(self, name: str) -> torch.Tensor:
        """[outputs] fp32 of a tensor with one number, or with one for each output of all ranks."""
        scales, num_outputs = self[name].float().flatten(), self.size[0]
        if len(scales) not in (1, num_outputs):
            found = f"its shape is {list(self[name].shape)}"
            raise self.refuse(name, found, f"one number, or one for each of {num_outputs} outputs")
        return scales.expand(num_outputs)[self.outputs.start : self.outputs.stop]

    def require_finite(self, name: str, scales: torch.Tensor) -> None:
        """Raises: FatalError: CorruptWeights; one such number would make every result none."""
        if not torch.isfinite(scales).all():
            raise self.refuse(name, "a scale is infinite, or no number", "finite")

    def refuse(self, name: str, value: object, expected: str) -> FatalError:
        """What is wrong with a tensor's values."""
        return FatalError(
            "CorruptWeights",
            f"{self.name}.{name}: {value}; it must be {expected}. Download the model again, or "
            "correct its quantization_config.",
        )


class StoredMethod(LinearMethod, Generic[S]):
    """A format that takes the checkpoint's tensors as they are, and makes its own of them."""

    def __init__(self, placement: Placement, activation: str | None = None, *, scheme: S) -> None:
        super().__init__(placement, activation)
        self._scheme = scheme

    @abstractmethod
    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        """What the checkpoint has for each matrix.

        Raises: FatalError: QuantizationMismatch.
        """

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        self._layout = layout
        self._tensors = self.tensors(layout)
        weights: dict[str, Parameter] = {**self._tensors}
        if has_bias:
            weights["bias"] = self.placement.parameter(layout, OUTPUT)
        return weights

    def stored(
        self,
        layout: Layout,
        *dims: Dim,
        dtypes: Sequence[torch.dtype] = FLOATS,
        is_optional: bool = False,
    ) -> StoredParameter:
        """Of these dimensions; without any, of any shape."""
        return StoredParameter(
            layout,
            dims or None,
            dtypes=dtypes,
            device=self.placement.device,
            parallel=self.placement.parallel,
            is_optional=is_optional,
        )

    def take_matrices(self) -> Iterator[Matrix]:
        """The parts of the layer; nothing of them is kept here."""
        layout, parallel = self._layout, self.placement.parallel
        for index, part in enumerate(layout.parts):
            matrix = Matrix(
                self.placement.module(part),
                layout.own(Axis.OUTPUT, part, parallel),
                layout.own(Axis.INPUT, part, parallel),
                (part.size, layout.in_features),
                {name: parameter.take(index) for name, parameter in self._tensors.items()},
            )
            for name, tensor in matrix.tensors.items():
                if tensor is not None and tensor.dtype in FLOATS:
                    matrix.require_finite(name, tensor)
            yield matrix

    def num_filled_up(self, matrices: Sequence[Matrix]) -> int:
        """Outputs of zeros that follow these; a layer that has some has one part."""
        if not self._layout.is_padded:
            return 0
        part = self._layout.parts[0]
        held = self._layout.held(Axis.OUTPUT, part, self.placement.parallel)
        return held - sum(len(matrix.outputs) for matrix in matrices)


def pieces(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Of a matrix, so small that little memory is needed beside it."""
    rows = max(1, NUMBERS_AT_ONCE // num_columns // ROWS_AT_ONCE) * ROWS_AT_ONCE
    for first in range(0, num_rows, rows):
        yield slice(first, min(first + rows, num_rows))
