"""Norms, computed in fp32."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pagoda_kernels import norm as kernels
from pagoda_kernels.norm import LayerNormWeights, RMSNormWeights
from pagoda_runtime.layers.module import Module
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import OUTPUT, Layout, Parameter, Part


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
        self.parameters["weight"] = make_weight(placement, Part("", size))
        self.floor = norm_floor(eps, size, placement.device)

    def use_parameters(self) -> None:
        weight = folded_weight(self.parameters["weight"].data, self.weight_offset)
        self.weights = RMSNormWeights(weight, self.floor)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, size] fp32; the result has the model's dtype."""
        return kernels.norm(x, self.weights, self.dtype)


def make_weight(placement: Placement, *parts: Part) -> Parameter:
    """[sum of the parts' sizes] fp32, whatever the model's dtype.

    AWQ may leave 1 + weight some hundreds of times smaller; a weight near -1 cannot say so in bf16.
    """
    return replace(placement, dtype=torch.float32).parameter(Layout(parts), OUTPUT)


def norm_floor(eps: float, size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(math.sqrt(eps * size), dtype=torch.float32, device=device)


def folded_weight(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """weight: fp32, as one plus a small bf16 weight is not a bf16 number."""
    return (weight + offset) * math.sqrt(weight.shape[-1])


class LayerNorm(Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    def __init__(
        self, size: int, *, eps: float, has_bias: bool = True, placement: Placement
    ) -> None:
        super().__init__()
        self.dtype, self.eps = placement.dtype, eps
        for name in ("weight", "bias") if has_bias else ("weight",):
            self.parameters[name] = make_weight(placement, Part("", size))

    def use_parameters(self) -> None:
        weight = self.parameters["weight"].data
        bias = self.parameters.get("bias")
        shift = torch.zeros_like(weight) if bias is None else bias.data
        self.weights = LayerNormWeights(weight, shift, self.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, size] fp32; the result has the model's dtype."""
        return kernels.norm(x, self.weights, self.dtype)


Norm = RMSNorm | LayerNorm


def add_and_norm(
    total: torch.Tensor, x: torch.Tensor, of_x: Norm | None, of_total: Norm | None
) -> torch.Tensor:
    """total += x, or += the norm of x, in place; then the norm of total, or without one total.

    Sums stay in fp32: adding to them in bf16 would round each time and cost a cast.

    Args:
        total: [num_tokens, size] fp32.
        x: as many, in the model's dtype.
    """
    return kernels.add_and_norm(
        total, x, of_x.weights if of_x else None, of_total.weights if of_total else None
    )
