"""EXL2's checkpoints: groups of inputs in 2 to 8 bits each, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from pagoda_kernels.grouped_linear import Grouped
from pagoda_runtime.quantization.grouped import GroupedMethod, Segment
from pagoda_runtime.quantization.order import ZERO_COLUMN, make_order
from pagoda_runtime.quantization.packing import WORD_BITS, span, unpack
from pagoda_runtime.quantization.parameter import ANY, Axis, Dim, Layout, StoredParameter
from pagoda_runtime.quantization.schemes import EXL2
from pagoda_runtime.quantization.stored import Matrix

_WIDTHS = (2, 3, 4, 5, 6, 8)
_COLUMNS = 32
"""What the number of outputs is filled up to a multiple of."""
_SCALE_BITS = 4
_SCALES_PER_WORD = WORD_BITS // _SCALE_BITS


class _Group(NamedTuple):
    number: int
    bits: int
    words: range
    """Rows of q_weight."""
    inputs: range
    """In the checkpoint's order."""


class EXL2Method(GroupedMethod[EXL2]):
    """q_weight [words, outputs], q_groups [2 * groups]: bits and the first row of words of each;
    q_scale [groups, outputs / 8] and q_scale_max [groups]: scales are (q_scale + 1) ** 2 *
    q_scale_max / 256; q_invperm [inputs]: where in the checkpoint's order each input lies.
    """

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        words, shorts = (torch.int32,), (torch.int16, torch.int32)
        outputs = Dim(Axis.OUTPUT, _COLUMNS, _COLUMNS)
        scales = Dim(Axis.OUTPUT, _COLUMNS, _COLUMNS // _SCALES_PER_WORD)
        return {
            "q_weight": self.stored(layout, ANY, outputs, dtypes=words),
            "q_groups": self.stored(layout, ANY, dtypes=shorts),
            "q_scale": self.stored(layout, ANY, scales, dtypes=words),
            "q_scale_max": self.stored(layout, ANY),
            "q_invperm": self.stored(layout, Dim(Axis.INPUT, is_whole=True), dtypes=shorts),
            "q_perm": self.stored(layout, ANY, dtypes=shorts, is_optional=True),
        }

    def segments(self, matrix: Matrix) -> list[Segment]:
        groups = list(_read_groups(matrix))
        order = _read_order(matrix)
        return [
            segment
            for _, some in groupby(groups, lambda group: group.bits)
            if (segment := self._segment(matrix, list(some), order)) is not None
        ]

    def _segment(
        self, matrix: Matrix, groups: list[_Group], channels: torch.Tensor
    ) -> Segment | None:
        """Of groups of one width; None if none of their inputs is this rank's.

        Args:
            channels: [inputs] int64: which of all ranks' inputs lies at each place.
        """
        own, bits = matrix.inputs, groups[0].bits
        channels = channels[groups[0].inputs.start : groups[-1].inputs.stop]
        is_own = (channels >= own.start) & (channels < own.stop)
        of_groups = is_own.split([len(group.inputs) for group in groups])
        counts = [int(of_group.sum()) for of_group in of_groups]
        present = [(n, group.number) for n, group in zip(counts, groups, strict=True) if n]
        if not present:
            return None
        # First in the places of the checkpoint, in which the numbers lie; then for x.
        counts, numbers = [n for n, _ in present], [number for _, number in present]
        largest = max(len(group.inputs) for group in groups)
        places = make_order(is_own.nonzero()[:, 0], counts, numbers, largest, channels.device)
        assert places.columns is not None
        columns = torch.where(
            places.columns == ZERO_COLUMN, ZERO_COLUMN, channels[places.columns] - own.start
        )
        words = slice(groups[0].words.start, groups[-1].words.stop)
        offset = matrix.outputs.start % _COLUMNS

        def read(rows: slice) -> Grouped:
            outputs = slice(offset + rows.start, offset + rows.stop)
            integers = unpack(matrix["q_weight"][words, outputs].T, bits)
            elements, inside = span(rows, offset, _SCALES_PER_WORD)
            roots = unpack(matrix["q_scale"][:, elements], _SCALE_BITS)[:, inside].float() + 1
            scales = roots * roots * (matrix["q_scale_max"].float() / 256)[:, None]
            return Grouped(
                places.arrange(integers).contiguous(), scales.T[:, places.group_of], None
            )

        return Segment(bits, replace(places, columns=columns), is_symmetric=True, rows=read)


def _read_groups(matrix: Matrix) -> Iterator[_Group]:
    stored, num_words = matrix["q_groups"].long(), len(matrix["q_weight"])
    counts = {name: len(matrix[name]) for name in ("q_scale", "q_scale_max")}
    for name, count in counts.items():
        if 2 * count != len(stored):
            raise matrix.refuse(
                name, f"it has {count} rows", f"half of the {len(stored)} of q_groups"
            )
    widths, starts = stored.view(-1, 2).T.tolist()
    first = 0
    for number, (bits, start) in enumerate(zip(widths, starts, strict=True)):
        stop = starts[number + 1] if number + 1 < len(starts) else num_words
        size = (stop - start) * WORD_BITS
        if (
            bits not in _WIDTHS
            or size <= 0
            or size % bits
            or (WORD_BITS % bits and size // bits % WORD_BITS)
        ):
            found = f"group {number} has {bits} bits and the words {start} to {stop}"
            raise matrix.refuse("q_groups", found, f"of {_WIDTHS} bits, and of whole words")
        yield _Group(number, bits, range(start, stop), range(first, first + size // bits))
        first += size // bits
    if first != matrix.size[1]:
        raise matrix.refuse(
            "q_groups", f"it is of {first} inputs", f"of the matrix's {matrix.size[1]}"
        )


def _read_order(matrix: Matrix) -> torch.Tensor:
    """[inputs] int64: which input lies at each place of the checkpoint's order."""
    places = matrix["q_invperm"].long() & 0xFFFF
    order = places.argsort()
    if not torch.equal(places[order], torch.arange(len(order), device=order.device)):
        raise matrix.refuse(
            "q_invperm", "it has some places twice", f"an order of {len(order)} inputs"
        )
    return order
