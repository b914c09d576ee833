"""From the hidden states of texts to a row of numbers for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import linear, relu

from pagoda_kernels.gated_activation import ACTIVATIONS
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.norm import LayerNorm
from pagoda_runtime.models.pooler_config import PoolerConfig, PoolerLayer
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Layout, Part

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **ACTIVATIONS,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": relu,
    "sigmoid": torch.sigmoid,
}


class Dense(Module):
    """A layer of the pooler, in fp32: it is small, and its results are what the user sees."""

    def __init__(
        self, config: PoolerLayer, *, norm_eps: float, norm_bias: bool, placement: Placement
    ) -> None:
        super().__init__()
        placement = replace(placement, dtype=torch.float32)
        layout = Layout([Part("", config.out_features)], config.in_features)
        self.parameters["weight"] = placement.parameter(layout, OUTPUT, INPUT)
        if config.has_bias:
            self.parameters["bias"] = placement.parameter(layout, OUTPUT)
        self.activation = _ACTIVATIONS[config.activation]
        self.norm = None
        if config.norm:
            self.norm = LayerNorm(
                config.out_features, eps=norm_eps, has_bias=norm_bias, placement=placement
            )

    def use_parameters(self) -> None:
        bias = self.parameters.get("bias")
        self.weight, self.bias = self.parameters["weight"].data, None if bias is None else bias.data

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(linear(x, self.weight, self.bias))
        return x if self.norm is None else self.norm(x)


class Pooler(Module):
    """Pools the states of each text, and applies the layers."""

    def __init__(
        self, config: PoolerConfig, *, norm_eps: float, norm_bias: bool, placement: Placement
    ) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.layers = [
            Dense(layer, norm_eps=norm_eps, norm_bias=norm_bias, placement=placement)
            for layer in config.layers
        ]

    def __call__(
        self,
        hidden: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor],
        lens: torch.Tensor,
        lasts: torch.Tensor,
    ) -> torch.Tensor:
        """[num_texts, outputs] fp32.

        Args:
            hidden: [num_tokens, hidden_size] fp32, all texts one after the other.
            norm: the model's last one; of a single token that is pooled no other is normed.
            lens, lasts: [num_texts] int64: tokens of each text, and the place of its last one.
        """
        if self.pooling == "mean":
            states = norm(hidden).float()
            pooled = torch.segment_reduce(states, "mean", lengths=lens, axis=0, unsafe=True)
        else:
            places = lasts if self.pooling == "last" else lasts - lens + 1
            pooled = norm(hidden.index_select(0, places)).float()
        for layer in self.layers:
            pooled = layer(pooled)
        return pooled
