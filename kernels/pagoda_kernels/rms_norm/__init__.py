"""Root mean square norm, by itself or added to a sum."""

from __future__ import annotations

import torch

from pagoda_kernels.cpu.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from pagoda_kernels.rms_norm.reference import (
    add_rms_norm_reference,
    rms_norm_reference,
    to_unit_norm,
)

__all__ = ["add_rms_norm", "rms_norm", "to_unit_norm"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x / hypot(|x|, floor) * weight over the last dimension, computed in fp32.

    Args:
        x: [num_rows, size] fp32, contiguous.
        weight: [size] fp32.
        floor: [] fp32.
        dtype: of the result.
    Raises: ValueError: shapes or layouts do not agree.
    """
    _check(x, weight)
    if x.device.type == "cpu" and dtype is torch.bfloat16:
        out = torch.empty(x.shape, dtype=dtype)
        rms_norm_cpu(x, weight, floor, out, *x.shape)
        return out
    return rms_norm_reference(x, weight, floor, dtype)


def add_rms_norm(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor
) -> None:
    """Add x / hypot(|x|, floor) * weight to total, in place.

    Args:
        total: [num_rows, size] fp32, contiguous.
        x: [num_rows, size], any float dtype, contiguous.
        weight, floor: as in `rms_norm`.
    Raises: ValueError: shapes or layouts do not agree.
    """
    _check(x, weight)
    if total.shape != x.shape or not total.is_contiguous():
        raise ValueError(f"total must be contiguous and have the shape {list(x.shape)} of x.")
    if x.device.type == "cpu" and x.dtype is torch.bfloat16:
        add_rms_norm_cpu(total, x, weight, floor, *x.shape)
    else:
        add_rms_norm_reference(total, x, weight, floor)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:] or not x.is_contiguous():
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}; "
            "they must be [num_rows, size], contiguous, and [size]."
        )
