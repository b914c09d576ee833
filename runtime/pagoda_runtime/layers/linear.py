"""Linear layers: a weight made of the checkpoint's matrices, and a method that multiplies by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch.nn.functional import linear, pad


class LinearMethod(Protocol):
    """How a product with a weight is computed; made once the weight is loaded."""

    copies_weight: bool
    """Whether it holds a copy in a layout of its own, and not the weight it was made of."""

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(x @ weight.T + bias) * factor.

        Args:
            x: [num_tokens, in_features].
            factor: the shape and dtype of the result.
        """


class PlainLinear:
    """torch's own linear."""

    copies_weight = False

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = linear(x, self.weight, bias)
        return product if factor is None else product.mul_(factor)


class PrepackedLinear:
    """oneDNN's linear with a weight in oneDNN's own layout, for bf16 on a CPU.

    At 2 to 64 rows about twice as fast as torch's linear, which packs the weight at each call.
    The packed weight is a second copy until the caller drops the plain one.

    Args:
        activation: applied to the product, in fp32 before it is rounded; a name of ACTIVATIONS.
            Not together with a factor.
    """

    copies_weight = True

    def __init__(self, weight: torch.Tensor, activation: str | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_with = torch.ops.mkldnn._linear_pointwise.binary
        self._post_op = _POST_OPS[activation]

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        product: torch.Tensor
        if factor is None:
            name, algorithm = self._post_op
            product = self._multiply(x, self.packed, bias, name, [], algorithm)
        else:
            assert self._post_op[0] == "none"
            product = self._multiply_with(x, factor, self.packed, bias, "mul")
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

    def __init__(self, method: LinearMethod) -> None:
        self.method = method
        self.copies_weight = method.copies_weight

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_rows = len(x)
        missing = -num_rows % self.NUM_ROWS
        operands = [x] if factor is None else [x, factor]
        padded = [pad(operand, (0, 0, 0, missing)) if missing else operand for operand in operands]
        tiles = [
            self.method.apply(tile, bias, *factors)
            for tile, *factors in zip(*(p.split(self.NUM_ROWS) for p in padded), strict=True)
        ]
        return torch.cat(tiles)[:num_rows] if len(tiles) > 1 else tiles[0][:num_rows]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the CPU multiplies bf16 itself (AMX or AVX512-bf16), so that packing pays."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def make_linear_method(weight: torch.Tensor) -> LinearMethod:
    """The fastest method for this weight on its device."""
    if weight.dtype is torch.bfloat16 and has_fast_bf16(weight.device):
        return PrepackedLinear(weight)
    return PlainLinear(weight)


def fastest_min_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Rows below which a product takes no less time.

    oneDNN's packed bf16 product is bound by memory up to 4 rows, and on AVX512 its kernel for 1
    to 3 rows reads memory 10 to 20 % slower than the one for 4.
    """
    return 4 if dtype is torch.bfloat16 and has_fast_bf16(device) else 1


class Linear:
    """y = x @ weight.T + bias, where the weight stacks one or more of the checkpoint's matrices.

    Args:
        shards: rows of each of the checkpoint's matrices, by name, in order:
            {"q_proj": 512, "k_proj": 128, "v_proj": 128}.
    """

    def __init__(
        self,
        in_features: int,
        shards: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shards = dict(shards)
        self.weight = torch.empty(sum(shards.values()), in_features, dtype=dtype, device=device)
        self.bias = self.weight.new_empty(len(self.weight)) if bias else None
        self.method: LinearMethod = PlainLinear(self.weight)

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
        self.method = make_linear_method(self.weight)
        del self.weight

    def fix_rows(self) -> None:
        self.method = FixedRowsLinear(self.method)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(x, self.bias)
