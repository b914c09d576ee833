"""Matrices of 8 bits with scales: Hugging Face's fp8, and compressed-tensors' fp8 and int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

import torch
from torch.nn.functional import pad

from pagoda_kernels.scaled_linear import Rounding, Scaled, ScaledShape, make_scaled_linear
from pagoda_runtime.quantization.parameter import (
    FLOATS,
    INPUT,
    OUTPUT,
    Axis,
    Dim,
    Layout,
    Parameter,
    StoredParameter,
)
from pagoda_runtime.quantization.schemes import ScaledNumbers
from pagoda_runtime.quantization.stored import Matrix, StoredMethod, pieces

NUMBERS = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


class ScaledMethod(StoredMethod[ScaledNumbers]):
    """weight [outputs, inputs], weight_scale of one number, one for each output, or one for each
    block, and input_scale of x, if it is rounded by one.

    Every output gets scales of its own; so parts that are stacked may have others.
    """

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        numbers, block_size = NUMBERS[self._scheme.numbers], self._scheme.block_size
        dims = [Dim(axis, block_size, is_whole=True) for axis in Axis] if block_size else []
        found = {
            "weight": self.stored(layout, OUTPUT, INPUT, dtypes=(numbers,)),
            "weight_scale": self.stored(layout, *dims),
        }
        if self._scheme.activations == "static":
            found["input_scale"] = self.stored(layout)
        if self._scheme.activations == "none":
            # Of x that would be rounded with a zero of its own, and stays as it is.
            for name, dtypes in (("input_scale", FLOATS), ("input_zero_point", (torch.int8,))):
                found[name] = self.stored(layout, dtypes=dtypes, is_optional=True)
        return found

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        matrices = list(self.take_matrices())
        num_own = sum(len(matrix.outputs) for matrix in matrices)
        num_outputs = num_own + self.num_filled_up(matrices)
        inputs = matrices[0].inputs
        # A block that a cut crosses is filled up with zeros at its beginning.
        size = self._scheme.block_size or len(inputs)
        lead = inputs.start % size if self._scheme.block_size else 0
        shape = ScaledShape(num_outputs, lead + len(inputs), NUMBERS[self._scheme.numbers], size)
        input_scale = None
        if self._scheme.activations == "static":
            # The parts have one x: the largest scale leaves none of it out.
            largest = max(_one_number(matrix, "input_scale") for matrix in matrices)
            input_scale = torch.tensor(largest, device=self.placement.device)
        product = make_scaled_linear(
            shape,
            Rounding(self._scheme.activations),
            dtype=self.placement.dtype,
            device=self.placement.device,
            activation=self.activation,
            input_scale=input_scale,
        )
        first = 0
        while matrices:
            matrix = matrices.pop(0)
            read = self._reader(matrix, lead)
            for rows in pieces(len(matrix.outputs), shape.inputs):
                product.fill(first + rows.start, read(rows))
            first += len(matrix.outputs)
            del matrix, read
        product.finish(weights["bias"].data if "bias" in weights else None)
        self._made, multiply = product, product.__call__
        if lead:
            multiply = lambda x: product(pad(x, (lead, 0)))  # noqa: E731
        self.use(multiply, are_rows_alike=product.are_rows_alike)

    def _reader(self, matrix: Matrix, lead: int) -> Callable[[slice], Scaled]:
        block_size = self._scheme.block_size
        if not block_size:
            of_rows = matrix.row_scales("weight_scale")[:, None].contiguous()
            return lambda rows: Scaled(matrix["weight"][rows], of_rows[rows])
        inputs, stored = matrix.inputs, matrix["weight_scale"].float()
        blocks = slice(inputs.start // block_size, ceil(inputs.stop / block_size))

        def read(rows: slice) -> Scaled:
            numbers = matrix["weight"][rows]
            if lead:
                padded = numbers.new_zeros(len(numbers), lead + len(inputs))
                padded[:, lead:] = numbers
                numbers = padded
            outputs = torch.arange(rows.start, rows.stop, device=stored.device)
            own = (outputs + matrix.outputs.start) // block_size
            return Scaled(numbers, stored[own, blocks])

        return read

    @property
    def num_bytes(self) -> int:
        return self._made.num_bytes


def _one_number(matrix: Matrix, name: str) -> float:
    tensor = matrix[name]
    if tensor.numel() != 1 or not (number := tensor.item()) > 0:
        found = f"it is {list(tensor.shape)}" if tensor.numel() != 1 else f"it is {tensor.item()}"
        raise matrix.refuse(name, found, "one positive number")
    return number
