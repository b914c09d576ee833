"""AWQ's checkpoints: 4 bits, eight outputs to a word."""

from __future__ import annotations

import torch

from pagoda_kernels.grouped_linear import Grouped
from pagoda_runtime.quantization.grouped import GroupedMethod, Segment
from pagoda_runtime.quantization.order import order_of_runs
from pagoda_runtime.quantization.packing import span, unpack
from pagoda_runtime.quantization.parameter import (
    INPUT,
    OUTPUT,
    Axis,
    Dim,
    Layout,
    StoredParameter,
)
from pagoda_runtime.quantization.schemes import AWQ
from pagoda_runtime.quantization.stored import Matrix

_BITS, _PER_WORD = 4, 8


class AWQMethod(GroupedMethod[AWQ]):
    """qweight [inputs, outputs / 8], qzeros [groups, outputs / 8], scales [groups, outputs].

    The lower half of a word has its even outputs, the upper half the odd ones.
    """

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        self._group_size = self.require_groups(layout, self._scheme.group_size)
        packed, groups = Dim(Axis.OUTPUT, _PER_WORD), Dim(Axis.INPUT, self._group_size)
        words = (torch.int32,)
        return {
            "qweight": self.stored(layout, INPUT, packed, dtypes=words),
            "qzeros": self.stored(layout, groups, packed, dtypes=words),
            "scales": self.stored(layout, groups, OUTPUT),
        }

    def segments(self, matrix: Matrix) -> list[Segment]:
        order = order_of_runs(matrix.inputs, self._group_size, self.placement.device)
        groups = order.group_of - matrix.inputs.start // self._group_size
        offset = matrix.outputs.start % _PER_WORD

        def unpack_rows(name: str, rows: slice) -> torch.Tensor:
            words, own = span(rows, offset, _PER_WORD)
            halves = unpack(matrix[name][:, words], _BITS).unflatten(1, (-1, 2, _PER_WORD // 2))
            return halves.transpose(2, 3).flatten(1)[:, own].T

        def read(rows: slice) -> Grouped:
            return Grouped(
                order.arrange(unpack_rows("qweight", rows)).contiguous(),
                matrix["scales"][:, rows].T[:, groups].float(),
                unpack_rows("qzeros", rows)[:, groups].float(),
            )

        return [Segment(_BITS, order, is_symmetric=False, rows=read)]
