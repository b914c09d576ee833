"""The feed-forward layer."""

from __future__ import annotations

import torch

from pagoda_kernels.gated_activation import ACTIVATIONS
from pagoda_runtime.layers.linear import Linear
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Axis, Part


class MLP(Module):
    """down(activation(gate(x)) * up(x)); not gated: down(activation(up(x)))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        is_gated: bool,
        bias: bool,
        placement: Placement,
    ) -> None:
        super().__init__()
        names = ("gate_proj", "up_proj") if is_gated else ("up_proj",)
        self.gate_up_proj = Linear(
            hidden_size,
            [Part(name, intermediate_size) for name in names],
            cut=Axis.OUTPUT,
            bias=bias,
            placement=placement,
            activation=activation if is_gated else None,
        )
        self.activation = None if is_gated else ACTIVATIONS[activation]
        self.down_proj = Linear(
            intermediate_size,
            [Part("down_proj", hidden_size)],
            cut=Axis.INPUT,
            bias=bias,
            placement=placement,
        )

    def __call__(self, x: torch.Tensor, step: StepInput) -> torch.Tensor:
        inner = self.gate_up_proj(x, step)
        if self.activation is not None:
            inner = self.activation(inner)
        return self.down_proj(inner, step)
