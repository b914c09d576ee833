"""How fast products with quantized matrices are, beside those with matrices of the model's dtype.

Several matrices take turns, more than any cache of a GPU holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpu.attention_speed import seconds_of
from gpu.scale import Scale
from pagoda_kernels.grouped_linear import Grouped, GroupedShape, make_grouped_linear
from pagoda_kernels.scaled_linear import Rounding, Scaled, ScaledShape, make_scaled_linear

MATRICES = 8
GROUP_SIZE = 128
# Of a matrix that is filled at once, beside which its numbers lie in 32 bits.
_ROWS_AT_ONCE = 1024

Product = Callable[[Tensor], Tensor]


def measure_products(scale: Scale, device: torch.device) -> dict[str, float]:
    """Products a second: `int4_1` is of one row with a matrix of 4 bits, and so on."""
    inputs, _ = scale.product_shape
    kinds: dict[str, Callable[[], Product]] = {
        "plain": lambda: make_plain(scale, device),
        "int4": lambda: make_int4(scale, device),
        "fp8": lambda: make_scaled(scale, torch.float8_e4m3fn, inputs, device),
        "fp8_blocks": lambda: make_scaled(scale, torch.float8_e4m3fn, GROUP_SIZE, device),
        "int8": lambda: make_scaled(scale, torch.int8, inputs, device),
    }
    figures = {}
    for name, make in kinds.items():
        products = [make() for _ in range(MATRICES)]
        for num_rows in scale.product_rows:
            x = torch.randn(num_rows, inputs, dtype=scale.dtype, device=device)
            seconds = seconds_of(lambda: multiply(products, x), scale, device)  # noqa: B023
            figures[f"{name}_{num_rows}"] = MATRICES / seconds
    return figures


def multiply(products: Sequence[Product], x: Tensor) -> None:
    """By all of them, one after the other."""
    for product in products:
        product(x)


def make_plain(scale: Scale, device: torch.device) -> Product:
    inputs, outputs = scale.product_shape
    weight = torch.randn(outputs, inputs, dtype=scale.dtype, device=device)
    return lambda x: linear(x, weight)


def make_int4(scale: Scale, device: torch.device) -> Product:
    """As AWQ has them: groups of 128 with zeros."""
    inputs, outputs = scale.product_shape
    shape = GroupedShape(outputs, inputs, 4, GROUP_SIZE)
    product = make_grouped_linear(shape, dtype=scale.dtype, device=device)
    for first in range(0, outputs, _ROWS_AT_ONCE):
        num_rows = min(_ROWS_AT_ONCE, outputs - first)
        groups = num_rows, inputs // GROUP_SIZE
        integers = torch.randint(16, (num_rows, inputs), dtype=torch.uint8, device=device)
        scales = torch.full(groups, 0.01, device=device)
        zeros = torch.randint(16, groups, device=device).float()
        product.fill(first, Grouped(integers, scales, zeros))
    product.finish(None)
    return product


def make_scaled(scale: Scale, dtype: torch.dtype, group_size: int, device: torch.device) -> Product:
    """With rows that are rounded by their largest numbers."""
    inputs, outputs = scale.product_shape
    shape = ScaledShape(outputs, inputs, dtype, group_size)
    product = make_scaled_linear(shape, Rounding.DYNAMIC, dtype=scale.dtype, device=device)
    numbers = torch.randn(outputs, inputs, device=device).to(dtype)
    scales = torch.full((outputs, inputs // group_size), 0.01, device=device)
    product.fill(0, Scaled(numbers, scales))
    product.finish(None)
    return product
