"""compressed-tensors' pack-quantized checkpoints: 4 or 8 bits, inputs side by side in words."""

from __future__ import annotations

import torch

from pagoda_kernels.grouped_linear import Grouped
from pagoda_runtime.quantization.grouped import GroupedMethod, Segment
from pagoda_runtime.quantization.packing import WORD_BITS, span, unpack
from pagoda_runtime.quantization.parameter import (
    INPUT,
    OUTPUT,
    Axis,
    Dim,
    Layout,
    StoredParameter,
)
from pagoda_runtime.quantization.schemes import WHOLE_ROW, PackedIntegers
from pagoda_runtime.quantization.stored import Matrix

_INTEGERS = (torch.int32, torch.int64)


class PackedMethod(GroupedMethod[PackedIntegers]):
    """weight_packed [outputs, inputs * bits / 32], weight_scale [outputs, groups], and
    weight_zero_point [outputs * bits / 32, groups]: numbers plus 2 ** (bits - 1).
    """

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        self._per = WORD_BITS // self._scheme.bits
        self._group_size = self.require_groups(layout, self._scheme.group_size)
        groups = Dim(Axis.INPUT, self._group_size, is_whole=True)
        packed, words = {axis: Dim(axis, self._per) for axis in Axis}, (torch.int32,)
        # One scale of the whole matrix may be one number.
        scale_dims = () if self._scheme.group_size == WHOLE_ROW else (OUTPUT, groups)
        found = {
            "weight_packed": self.stored(layout, OUTPUT, packed[Axis.INPUT], dtypes=words),
            "weight_scale": self.stored(layout, *scale_dims),
            "weight_shape": self.stored(layout, dtypes=_INTEGERS, is_optional=True),
            "weight_g_idx": self.stored(
                layout, INPUT, dtypes=_INTEGERS, is_optional=not self._scheme.is_ordered
            ),
        }
        if not self._scheme.is_symmetric:
            dims = packed[Axis.OUTPUT], groups
            found["weight_zero_point"] = self.stored(layout, *dims, dtypes=words)
        return found

    def segments(self, matrix: Matrix) -> list[Segment]:
        shape = matrix.tensors["weight_shape"]
        if shape is not None and (found := shape.tolist()) != [*matrix.size]:
            raise matrix.refuse("weight_shape", found, f"{[*matrix.size]} as in config.json")
        order = self.order_of(matrix, "weight_g_idx", self._group_size)
        starts = matrix.outputs.start % self._per, matrix.inputs.start % self._per
        all_inputs, is_symmetric = slice(0, len(matrix.inputs)), self._scheme.is_symmetric
        scales = matrix["weight_scale"]
        if self._scheme.group_size == WHOLE_ROW:
            scales = matrix.row_scales("weight_scale")[:, None]

        def read(rows: slice) -> Grouped:
            words, own = span(all_inputs, starts[1], self._per)
            numbers = unpack(matrix["weight_packed"][rows, words], self._scheme.bits)[:, own]
            zeros = None
            if not is_symmetric:
                words, own = span(rows, starts[0], self._per)
                stored = unpack(matrix["weight_zero_point"][words].T, self._scheme.bits)
                zeros = stored.T[own][:, order.group_of].float()
            own_scales = scales[rows][:, order.group_of].float()
            return Grouped(order.arrange(numbers).contiguous(), own_scales, zeros)

        return [Segment(self._scheme.bits, order, is_symmetric, read)]
