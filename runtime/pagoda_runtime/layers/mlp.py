"""The gated feed-forward layer."""

from __future__ import annotations

import torch
from torch import nn

from pagoda_runtime.layers.activation import ACTIVATIONS, gated_activation
from pagoda_runtime.layers.linear import Linear
from pagoda_runtime.models.config import ModelConfig


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = Linear(
            config.hidden_size,
            {"gate_proj": size, "up_proj": size},
            bias=bias,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(
            size, {"down_proj": config.hidden_size}, bias=bias, dtype=dtype, device=device
        )

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        return self.gate_up_proj.targets(prefix) | self.down_proj.targets(prefix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated_activation(self.gate_up_proj(x), self.activation))
