"""The specification of the norms in plain torch; results are fp32."""

from __future__ import annotations

import torch
from torch.linalg import vector_norm
from torch.nn.functional import layer_norm


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """See `pagoda_kernels.norm.RMSNormWeights`."""
    return to_unit_norm(x, floor).mul_(weight)


def add_rms_norm_reference(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor
) -> None:
    """total += the norm of x."""
    total.addcmul_(to_unit_norm(x, floor), weight)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `pagoda_kernels.norm.LayerNormWeights`."""
    return layer_norm(x.float(), weight.shape, weight, bias, eps)


def to_unit_norm(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / hypot(|x|, floor) over the last dimension, in fp32."""
    # Cast once: an operation on two dtypes would cast again by itself.
    wide = x.float()
    norm = vector_norm(wide, 2, -1, True).hypot_(floor)
    return wide / norm if wide is x else wide.div_(norm)
