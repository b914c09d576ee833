"""Linear layers: a weight made of the checkpoint's matrices, and a method that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch.nn.functional import linear, pad

from pagoda_kernels.cpu.packed_linear import PackedMatrix, can_pack


class LinearMethod(Protocol):
    """x @ weight.T + bias; made once the weight is loaded."""

    copies_weight: bool
    """Whether it holds a copy in a layout of its own, and not the weight it was made of."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[num_tokens, out_features] of x, [num_tokens, in_features]."""


class PlainLinear:
    """torch's own linear."""

    copies_weight = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class PackedLinear(PackedMatrix):
    """Pagoda's own product, for bf16 on a CPU with AVX512-bf16.

    Against oneDNN's: 1.2 to 1.5 times as fast at up to 16 rows, where reading the weight takes as
    long as multiplying by it, and equal at many.
    """

    copies_weight = True


class PrepackedLinear:
    """oneDNN's linear with a weight in oneDNN's own layout, for bf16 on a CPU with AMX.

    The packed weight is a second copy until the caller drops the plain one.

    Args:
        activation: applied to the product, in fp32 before it is rounded; a name of ACTIVATIONS.
            Not together with a factor.
    """

    copies_weight = True

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


_POST_OPS: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}
"""Activation → what oneDNN calls it, and which form of it."""


class FixedRowsLinear:
    """Another method, always called with the same number of rows.

    How a product sums may depend on its number of rows; so the bits of a row's result would depend
    on its neighbours. With one number of rows they do not.
    """

    NUM_ROWS = 16

    def __init__(self, method: Callable[..., torch.Tensor]) -> None:
        self.method = method
        self.copies_weight: bool = getattr(method, "copies_weight", False)

    def __call__(self, *operands: torch.Tensor) -> torch.Tensor:
        """Args: operands: of the method, cut into tiles of rows."""
        num_rows = len(operands[0])
        missing = -num_rows % self.NUM_ROWS
        padded = [pad(operand, (0, 0, 0, missing)) if missing else operand for operand in operands]
        tiles = [
            self.method(*tile)
            for tile in zip(*(p.split(self.NUM_ROWS) for p in padded), strict=True)
        ]
        return torch.cat(tiles)[:num_rows] if len(tiles) > 1 else tiles[0][:num_rows]


def fix_rows(method: LinearMethod) -> LinearMethod:
    """The method, or one like it, whose result for a row does not depend on the other rows."""
    return method if isinstance(method, PackedLinear) else FixedRowsLinear(method)


def has_amx(device: torch.device) -> bool:
    """Whether the CPU multiplies tiles of bf16, which oneDNN's product uses."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.cpu._is_amx_tile_supported())


def make_linear_method(
    weight: torch.Tensor, bias: torch.Tensor | None = None, quantization: str | None = None
) -> LinearMethod:
    """The fastest method for this weight on its device.

    Args:
        quantization: int8 if it is to be rounded, for which it must be one that `can_pack`.
    """
    if quantization == "int8":
        return PackedLinear(weight, bias, is_int8=True)
    if weight.dtype is torch.bfloat16 and has_amx(weight.device):
        return PrepackedLinear(weight, bias)
    if can_pack(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class Linear:
    """y = x @ weight.T + bias, where the weight stacks one or more of the checkpoint's matrices.

    Args:
        shards: rows of each of the checkpoint's matrices, by name, in order:
            {"q_proj": 512, "k_proj": 128, "v_proj": 128}.
        quantization: what the weight becomes after it is loaded: see `make_linear_method`.
    """

    def __init__(
        self,
        in_features: int,
        shards: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
    ) -> None:
        self.shards = dict(shards)
        self.quantization = quantization
        self.weight = torch.empty(sum(shards.values()), in_features, dtype=dtype, device=device)
        self.bias = self.weight.new_empty(len(self.weight)) if bias else None
        self.method: LinearMethod = PlainLinear(self.weight, self.bias)

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each tensor of the checkpoint goes: its name → a view of the weight or bias."""
        targets = {}
        first = 0
        for name, rows in self.shards.items():
            targets[f"{prefix}{name}.weight"] = self.weight[first : first + rows]
            if self.bias is not None:
                targets[f"{prefix}{name}.bias"] = self.bias[first : first + rows]
            first += rows
        return targets

    def after_loading(self) -> None:
        """Choose the method; the weight then belongs to it alone."""
        self.method = make_linear_method(self.weight, self.bias, self.quantization)
        del self.weight

    def fix_rows(self) -> None:
        self.method = fix_rows(self.method)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.method(x)
