"""GPTQ's checkpoints: 2, 3, 4 or 8 bits, inputs side by side in words."""

from __future__ import annotations

from collections.abc import Mapping

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
    Parameter,
    StoredParameter,
)
from pagoda_runtime.quantization.schemes import GPTQ
from pagoda_runtime.quantization.stored import Matrix


class GPTQMethod(GroupedMethod[GPTQ]):
    """qweight [inputs * bits / 32, outputs], qzeros [groups, outputs * bits / 32],
    scales [groups, outputs] and g_idx [inputs]: the group of each input.
    """

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        bits = self._scheme.bits
        self._per, self._words = (WORD_BITS, bits) if WORD_BITS % bits else (WORD_BITS // bits, 1)
        self._group_size = self.require_groups(layout, self._scheme.group_size)
        # Which groups the inputs have is known from g_idx only.
        groups = Dim(Axis.INPUT, self._group_size, is_whole=True)
        words = (torch.int32,)
        packed = {axis: Dim(axis, self._per, self._words) for axis in Axis}
        return {
            "qweight": self.stored(layout, packed[Axis.INPUT], OUTPUT, dtypes=words),
            "qzeros": self.stored(layout, groups, packed[Axis.OUTPUT], dtypes=words),
            "scales": self.stored(layout, groups, OUTPUT),
            "g_idx": self.stored(
                layout,
                INPUT,
                dtypes=(torch.int32, torch.int64),
                is_optional=not self._scheme.desc_act,
            ),
        }

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        weights = super().create_weights(layout, has_bias=has_bias)
        if not has_bias:
            # Some tools write one for every matrix.
            weights["bias"] = self.placement.parameter(layout, OUTPUT)
            weights["bias"].data.zero_()
            weights["bias"].is_optional = True
        return weights

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        bias = weights["bias"]
        if bias.is_optional and not bias.data.any():
            weights = {name: weights[name] for name in weights if name != "bias"}
        super().after_loading(weights)

    def segments(self, matrix: Matrix) -> list[Segment]:
        bits, order = self._scheme.bits, self.order_of(matrix, "g_idx", self._group_size)
        middle = 2 ** (bits - 1)
        starts = matrix.outputs.start % self._per, matrix.inputs.start % self._per
        all_inputs = slice(0, len(matrix.inputs))

        def zeros(rows: slice) -> torch.Tensor:
            """[groups, rows], as numbers have them."""
            words, own = span(rows, starts[0], self._per, self._words)
            stored = unpack(matrix["qzeros"][:, words], bits)[:, own]
            return stored if self._scheme.is_v2 else (stored + 1) & (2**bits - 1)

        is_symmetric = bool((zeros(slice(0, len(matrix.outputs))) == middle).all())

        def read(rows: slice) -> Grouped:
            words, own = span(all_inputs, starts[1], self._per, self._words)
            numbers = unpack(matrix["qweight"][words, rows].T, bits)[:, own]
            return Grouped(
                order.arrange(numbers).contiguous(),
                matrix["scales"][:, rows].T[:, order.group_of].float(),
                None if is_symmetric else zeros(rows).T[:, order.group_of].float(),
            )

        return [Segment(bits, order, is_symmetric, read)]
