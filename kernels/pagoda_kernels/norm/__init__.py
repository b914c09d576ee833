"""Norms over the last dimension, by themselves or with the sum that they are of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pagoda_kernels.cpu.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from pagoda_kernels.launch import uses_triton
from pagoda_kernels.norm.reference import (
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)


class RMSNormWeights(NamedTuple):
    """x / hypot(|x|, floor) * weight; weight is [size] fp32, floor [] fp32."""

    weight: torch.Tensor
    floor: torch.Tensor


class LayerNormWeights(NamedTuple):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias; weight and bias are [size] fp32."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


NormWeights = RMSNormWeights | LayerNormWeights


def norm(x: torch.Tensor, weights: NormWeights, dtype: torch.dtype) -> torch.Tensor:
    """The norm of each row, computed in fp32.

    Args:
        x: [num_rows, size] fp32, contiguous.
        dtype: of the result.
    Raises: ValueError: shapes or layouts do not agree.
    """
    _check(x, weights)
    if uses_triton(x.device):
        from pagoda_kernels.norm.kernel import add_and_norm_triton

        return add_and_norm_triton(x, None, None, weights, dtype)
    return _norm(x, weights, dtype)


def add_and_norm(
    total: torch.Tensor, x: torch.Tensor, of_x: NormWeights | None, of_total: NormWeights | None
) -> torch.Tensor:
    """Add x, or its norm, to total in place, and return the norm of that sum.

    Args:
        total: [num_rows, size] fp32, contiguous.
        x: [num_rows, size], any float dtype, contiguous.
        of_x: None: x is added as it is.
        of_total: None: the norm of the sum is not wanted.
    Returns: [num_rows, size] in x's dtype; total itself if no norm is wanted.
    Raises: ValueError: shapes or layouts do not agree.
    """
    if total.shape != x.shape or not (total.is_contiguous() and x.is_contiguous()):
        raise ValueError(
            f"total is {list(total.shape)} and x {list(x.shape)}; they must agree, contiguous."
        )
    if of_x is not None:
        _check(x, of_x)
    if of_total is not None:
        _check(total, of_total)
    if uses_triton(x.device):
        from pagoda_kernels.norm.kernel import add_and_norm_triton

        return add_and_norm_triton(total, x, of_x, of_total, x.dtype)
    if of_x is None:
        total.add_(x)
    elif isinstance(of_x, LayerNormWeights):
        total.add_(layer_norm_reference(x, *of_x))
    elif x.dtype is torch.bfloat16 and x.is_cpu:
        add_rms_norm_cpu(total, x, *of_x, *x.shape)
    else:
        add_rms_norm_reference(total, x, *of_x)
    return total if of_total is None else _norm(total, of_total, x.dtype)


def _norm(x: torch.Tensor, weights: NormWeights, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weights, LayerNormWeights):
        return layer_norm_reference(x, *weights).to(dtype)
    if dtype is torch.bfloat16 and x.is_cpu:
        out = torch.empty(x.shape, dtype=dtype)
        rms_norm_cpu(x, *weights, out, *x.shape)
        return out
    return rms_norm_reference(x, *weights).to(dtype)


def _check(x: torch.Tensor, weights: NormWeights) -> None:
    if x.dim() != 2 or weights.weight.shape != x.shape[1:] or not x.is_contiguous():
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weights.weight.shape)}; "
            "they must be [num_rows, size], contiguous, and [size]."
        )
