"""The specification of rms_norm and add_rms_norm in plain torch."""

from __future__ import annotations

import torch
from torch.linalg import vector_norm


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """See `pagoda_kernels.rms_norm.rms_norm`."""
    return to_unit_norm(x, floor).mul_(weight).to(dtype)


def add_rms_norm_reference(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor
) -> None:
    """See `pagoda_kernels.rms_norm.add_rms_norm`."""
    total.addcmul_(to_unit_norm(x, floor), weight)


def to_unit_norm(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / hypot(|x|, floor) over the last dimension, in fp32."""
    # Cast once: an operation on two dtypes would cast again by itself.
    wide = x.float()
    norm = vector_norm(wide, 2, -1, True).hypot_(floor)
    return wide / norm if wide is x else wide.div_(norm)
