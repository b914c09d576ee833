"""Weights in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch.nn.functional import linear

from pagoda_kernels.cpu.packed_linear import PackedLinear, can_pack
from pagoda_kernels.gated_activation import gated_activation
from pagoda_runtime.quantization.base import LinearMethod, Product
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Layout, Parameter


class UnquantizedLinear(LinearMethod):
    """x @ weight.T + bias, by the product that is fastest on the device."""

    is_packed: bool
    """Whether it holds the weight in a layout of its own, which cannot serve as a table."""

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        weights = {"weight": self.placement.parameter(layout, OUTPUT, INPUT)}
        if has_bias:
            weights["bias"] = self.placement.parameter(layout, OUTPUT)
        return weights

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        bias = weights["bias"].data if "bias" in weights else None
        product = make_product(weights["weight"].data, bias, self.activation)
        self.is_packed = isinstance(product, PackedLinear | PrepackedLinear)
        self.use(product, are_rows_alike=isinstance(product, PackedLinear))


def make_product(
    weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> Product:
    """The fastest product with this weight on its device.

    On a CPU in bf16 that is oneDNN's where it has AMX, else Pagoda's own where it has AVX2 at
    least. With AVX512-bf16 it is against oneDNN's 1.2 to 1.5 times as fast at up to 16 rows, where
    reading the weight takes as long as multiplying by it, and equal at many; without, 5 times.

    Args:
        activation: of a weight that stacks gate and up; the product is activation(gate) * up.
    """
    if weight.dtype is torch.bfloat16 and has_amx(weight.device):
        return PrepackedLinear(weight, bias, activation)
    if can_pack(weight):
        return PackedLinear(weight, bias, activation)
    product = partial(linear, weight=weight, bias=bias)
    if activation is None:
        return product
    return lambda x: gated_activation(product(x), activation)


class PrepackedLinear:
    """oneDNN's linear with a weight in oneDNN's own layout, for bf16 on a CPU with AMX.

    Args:
        activation: see `make_product`; oneDNN's products activate and multiply by themselves.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
    ) -> None:
        num_parts = 1 if activation is None else 2
        biases = [None] * num_parts if bias is None else bias.chunk(num_parts)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.parts = [
            (reorder(part, None), part_bias)
            for part, part_bias in zip(weight.chunk(num_parts), biases, strict=True)
        ]
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_with = torch.ops.mkldnn._linear_pointwise.binary
        self._post_op = _POST_OPS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        name, algorithm = self._post_op
        result: torch.Tensor = self._multiply(x, *self.parts[0], name, [], algorithm)
        for part in self.parts[1:]:
            result = self._multiply_with(x, result, *part, "mul")
        return result


_POST_OPS: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}
"""Activation → what oneDNN calls it, and which form of it."""


def has_amx(device: torch.device) -> bool:
    """Whether the CPU multiplies tiles of bf16, which oneDNN's product uses."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.cpu._is_amx_tile_supported())
