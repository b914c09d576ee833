"""Matrices of whole numbers whose groups of inputs share a scale, as checkpoints store them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.grouped_linear import (
    Grouped,
    GroupedShape,
    make_grouped_linear,
)
from pagoda_kernels.quantized_linear import QuantizedLinear
from pagoda_runtime.errors import FatalError
from pagoda_runtime.quantization.order import Order, order_of_index, order_of_runs
from pagoda_runtime.quantization.parameter import Layout, Parameter
from pagoda_runtime.quantization.stored import Matrix, S, StoredMethod, pieces


@dataclass(frozen=True, slots=True)
class Segment:
    """Some inputs of a matrix, whose numbers have one width."""

    bits: int
    order: Order
    is_symmetric: bool
    rows: Callable[[slice], Grouped]
    """Some of the rank's outputs; integers in the order, a scale for each of its groups."""

    def shape(self, num_outputs: int) -> GroupedShape:
        order = self.order
        return GroupedShape(num_outputs, order.num_columns, self.bits, order.group_size)

    def goes_with(self, other: Segment) -> bool:
        """Whether the rows of another can follow in one matrix."""
        return self.bits == other.bits and self.order.equals(other.order)


class GroupedMethod(StoredMethod[S]):
    """A format whose matrices become those of `grouped_linear`.

    Parts whose inputs are in different orders, or in different numbers of bits, are products of
    their own, which lie beside each other in the result.
    """

    @abstractmethod
    def segments(self, matrix: Matrix) -> list[Segment]:
        """All that is known of a part, once it is loaded. Raises: FatalError: CorruptWeights."""

    def require_groups(self, layout: Layout, group_size: int) -> int:
        """The inputs of a group. Raises: FatalError: if not all groups are whole."""
        if group_size < 0:
            return layout.in_features
        if layout.in_features % group_size:
            raise FatalError(
                "QuantizationMismatch",
                f"{self.placement.module(layout.parts[0])}: its {layout.in_features} inputs are no "
                f"multiple of the group_size {group_size} in the checkpoint's quantization_config. "
                "Correct the file, or serve another quantization of the model.",
            )
        return group_size

    def order_of(self, matrix: Matrix, name: str, group_size: int) -> Order:
        """By the tensor that names the group of each input; without it they are runs."""
        index = matrix.tensors[name]
        if index is None:
            return order_of_runs(matrix.inputs, group_size, self.placement.device)
        num_groups = matrix.size[1] // group_size
        least, largest = (int(bound) for bound in index.aminmax())
        if least < 0 or largest >= num_groups:
            found = f"it names the groups {least} to {largest}"
            raise matrix.refuse(name, found, f"of {num_groups} groups, as many as there are scales")
        return order_of_index(index.long(), group_size)

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        bias = weights["bias"].data if "bias" in weights else None
        runs = _in_runs([(matrix, self.segments(matrix)) for matrix in self.take_matrices()])
        is_alone = len(runs) == 1 and len(runs[0][0][1]) == 1
        inner = self.activation if is_alone else None
        self._outer = None if is_alone else self.activation
        self._products: list[list[tuple[Order, QuantizedLinear[Grouped]]]] = []
        first = 0
        while runs:
            run = runs.pop(0)
            matrices = [matrix for matrix, _ in run]
            filled_up = self.num_filled_up(matrices)
            num_outputs = sum(len(matrix.outputs) for matrix in matrices) + filled_up
            matrices.clear()
            own_bias = None if bias is None else bias[first : first + num_outputs]
            self._products.append(self._make_products(run, num_outputs, own_bias, inner))
            first += num_outputs
        products = (product for run in self._products for _, product in run)
        self.use(self._multiply, are_rows_alike=all(p.are_rows_alike for p in products))

    def _make_products(
        self,
        run: _Run,
        num_outputs: int,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> list[tuple[Order, QuantizedLinear[Grouped]]]:
        made = []
        for number, segment in enumerate(run[0][1]):
            product = make_grouped_linear(
                segment.shape(num_outputs),
                dtype=self.placement.dtype,
                device=self.placement.device,
                activation=activation,
                is_symmetric=all(segments[number].is_symmetric for _, segments in run),
            )
            made.append((segment.order, product))
        del segment
        first = 0
        while run:
            first += _fill(made, first, *run.pop(0))
        for number, (_, product) in enumerate(made):
            product.finish(bias if number == 0 else None)
        return made

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for run in self._products:
            parts = (product(order.gather(x)) for order, product in run)
            y = next(parts)
            for part in parts:
                y += part
            found.append(y)
        result = found[0] if len(found) == 1 else torch.cat(found, 1)
        return result if self._outer is None else gated_activation(result, self._outer)

    @property
    def num_bytes(self) -> int:
        return sum(product.num_bytes for run in self._products for _, product in run)


_Run = list[tuple[Matrix, list[Segment]]]


def _in_runs(parts: _Run) -> list[_Run]:
    """Neighbours that can be one matrix."""
    runs: list[_Run] = []
    for part in parts:
        if runs and _go_together(runs[-1][0][1], part[1]):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _go_together(some: Sequence[Segment], others: Sequence[Segment]) -> bool:
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(a.goes_with(b) for a, b in pairs)


def _fill(
    products: Sequence[tuple[Order, QuantizedLinear[Grouped]]],
    first: int,
    matrix: Matrix,
    segments: Sequence[Segment],
) -> int:
    """Give a part's outputs to products, from an output on; return how many they are."""
    for (order, product), segment in zip(products, segments, strict=True):
        for rows in pieces(len(matrix.outputs), order.num_columns):
            product.fill(first + rows.start, segment.rows(rows))
    return len(matrix.outputs)
