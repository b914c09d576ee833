"""Norms, computed in fp32."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import layer_norm

from pagoda_kernels.rms_norm import add_rms_norm, rms_norm
from pagoda_runtime.layers.module import Module, own_layout
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import OUTPUT


class RMSNorm(Module):
    """x / rms(x) * weight over the last dimension.

    With the square root of the size folded into the weight this is
    `x / hypot(|x|, floor) * weight`, which takes half as many operations as the usual form:
    rms(x)² = (|x|² + size * eps) / size.

    Args:
        weight_offset: added to the stored weight (Gemma stores its norms minus one).
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def __init__(
        self, size: int, *, eps: float, weight_offset: float = 0.0, placement: Placement
    ) -> None:
        super().__init__()
        self.dtype = placement.dtype
        self.weight_offset = weight_offset
        self.parameters["weight"] = placement.parameter(own_layout(size), OUTPUT)
        self.floor = norm_floor(eps, size, placement.device)

    def use_parameters(self) -> None:
        self.weight = folded_weight(self.parameters["weight"].data, self.weight_offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, size] fp32; the result has the model's dtype."""
        return rms_norm(x, self.weight, self.floor, self.dtype)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """total += norm(x); total is fp32, x has the model's dtype."""
        add_rms_norm(total, x, self.weight, self.floor)


def norm_floor(eps: float, size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(math.sqrt(eps * size), dtype=torch.float32, device=device)


def folded_weight(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """In fp32, because one plus a small bf16 weight is not a bf16 number."""
    return (weight.float() + offset) * math.sqrt(weight.shape[-1])


class LayerNorm(Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    def __init__(self, size: int, *, eps: float, placement: Placement) -> None:
        super().__init__()
        self.dtype, self.eps = placement.dtype, eps
        for name in ("weight", "bias"):
            self.parameters[name] = placement.parameter(own_layout(size), OUTPUT)

    def use_parameters(self) -> None:
        self.weight = self.parameters["weight"].data.float()
        self.bias = self.parameters["bias"].data.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, size] fp32; the result has the model's dtype."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """total += norm(x); total is fp32, x has the model's dtype."""
        total.add_(layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps))


Norm = RMSNorm | LayerNorm
