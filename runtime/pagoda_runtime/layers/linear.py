"""Linear layers: the checkpoint's matrices that are stacked, and how ranks divide them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Axis, Layout, Part


class Linear(Module):
    """y = x @ weight.T + bias; with an activation of two parts activation(gate) * up.

    Args:
        cut: what ranks divide: the outputs, so that each has some of y, or the inputs, so that
            their results add up to y.
        activation: see `LinearMethod`.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        *,
        cut: Axis,
        bias: bool,
        placement: Placement,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.parallel = placement.parallel
        self.is_part = cut is Axis.INPUT and self.parallel.size > 1
        """Whether the ranks' results are to be added up."""
        self.method = placement.method(placement, activation)
        layout = Layout(parts, in_features, cut)
        self.parameters = self.method.create_weights(layout, has_bias=bias)
        own = [layout.own(Axis.OUTPUT, part, placement.parallel) for part in parts]
        inputs = layout.own(Axis.INPUT, parts[0], placement.parallel)
        self.multiplications_per_token = len(inputs) * sum(map(len, own))

    def use_parameters(self) -> None:
        if self.is_part and self.parallel.rank > 0 and "bias" in self.parameters:
            # The sum has it from rank 0.
            self.parameters["bias"].data.zero_()
        self.method.after_loading(self.parameters)
        self.weight_bytes = self.method.num_bytes or self.weight_bytes

    def __call__(self, x: torch.Tensor, step: StepInput) -> torch.Tensor:
        """[num_tokens, outputs] of x, [num_tokens, inputs]: a row for each token of the step."""
        y = self.method.apply(x)
        return self.parallel.all_reduce(y) if self.is_part else y
