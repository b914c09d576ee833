"""What the numbers of a matrix stand for."""

from __future__ import annotations

from torch import Tensor

from pagoda_kernels.scaled_linear import Scaled, ScaledShape


def dequantize(rows: Scaled, shape: ScaledShape) -> Tensor:
    """[outputs, inputs] fp32."""
    scales = rows.scales.repeat_interleave(shape.group_size, 1)[:, : shape.inputs]
    return rows.numbers.float() * scales
