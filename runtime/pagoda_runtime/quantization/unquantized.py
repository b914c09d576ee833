"""Weights in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch.nn.functional import linear

from pagoda_kernels.cpu.packed_linear import PackedGate, PackedMatrix, can_pack
from pagoda_kernels.gated_activation import gated_activation
from pagoda_runtime.quantization.base import LinearMethod, Placement, Product, fix_rows
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Layout, Parameter


class UnquantizedLinear(LinearMethod):
    """x @ weight.T + bias, by the product that is fastest on the device."""

    def create_weights(
        self, layout: Layout, placement: Placement, *, has_bias: bool
    ) -> dict[str, Parameter]:
        weights = {"weight": placement.parameter(layout, OUTPUT, INPUT)}
        if has_bias:
            weights["bias"] = placement.parameter(layout, OUTPUT)
        return weights

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        bias = weights["bias"].data if "bias" in weights else None
        self.product = make_product(weights["weight"].data, bias, self.activation)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)

    def fix_rows(self) -> None:
        # Pagoda's own products do so anyway.
        if not isinstance(self.product, PackedMatrix | PackedGate):
            self.product = fix_rows(self.product)

    @property
    def is_packed(self) -> bool:
        """Whether it holds the weight in a layout of its own, which cannot serve as a table."""
        return isinstance(self.product, PackedMatrix | PackedGate | PrepackedLinear | PrepackedGate)


def make_product(
    weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> Product:
    """The fastest product with this weight on its device.

    On a CPU in bf16 that is oneDNN's where it has AMX, else Pagoda's own where it has AVX512-bf16:
    against oneDNN's 1.2 to 1.5 times as fast at up to 16 rows, where reading the weight takes as
    long as multiplying by it, and equal at many.

    Args:
        activation: of a weight that stacks gate and up; the product is activation(gate) * up.
    """
    is_prepacked = weight.dtype is torch.bfloat16 and has_amx(weight.device)
    if not is_prepacked and not can_pack(weight):
        product = partial(linear, weight=weight, bias=bias)
        if activation is None:
            return product
        return lambda x: gated_activation(product(x), activation)
    if activation is None:
        return PrepackedLinear(weight, bias) if is_prepacked else PackedMatrix(weight, bias)
    gate, up = weight.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    return (PrepackedGate if is_prepacked else PackedGate)(gate, up, activation, *biases)


class PrepackedLinear:
    """oneDNN's linear with a weight in oneDNN's own layout, for bf16 on a CPU with AMX.

    Args:
        activation: applied to the product, in fp32 before it is rounded; a name of ACTIVATIONS.
            Not together with a factor.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_with = torch.ops.mkldnn._linear_pointwise.binary
        self._post_op = _POST_OPS[activation]

    def __call__(self, x: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
        """Args: factor: what the result is multiplied by, of its shape and dtype."""
        product: torch.Tensor
        if factor is None:
            name, algorithm = self._post_op
            product = self._multiply(x, self.packed, self.bias, name, [], algorithm)
        else:
            assert self._post_op[0] == "none"
            product = self._multiply_with(x, factor, self.packed, self.bias, "mul")
        return product


class PrepackedGate:
    """activation(gate(x)) * up(x), activated and multiplied in oneDNN's products."""

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> None:
        self.gate = PrepackedLinear(gate, gate_bias, activation=activation)
        self.up = PrepackedLinear(up, up_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x, self.gate(x))


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
