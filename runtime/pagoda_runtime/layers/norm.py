"""Root mean square norm."""

from __future__ import annotations

import math

import torch
from torch.linalg import vector_norm


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in fp32.

    With the square root of the size folded into the weight this is
    `x / hypot(|x|, floor) * weight`, which takes half as many operations as the usual form:
    rms(x)² = (|x|² + size * eps) / size.

    Args:
        weight_offset: added to the stored weight (Gemma stores its norms minus one).
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        weight_offset: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.weight_offset = weight_offset
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.floor = norm_floor(eps, size, device)

    def after_loading(self) -> None:
        self.weight = folded_weight(self.weight, self.weight_offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size], any float dtype; the result has the model's dtype."""
        return to_unit_norm(x, self.floor).mul_(self.weight).to(self.dtype)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """total + norm(x), in place; total is fp32."""
        return total.addcmul_(to_unit_norm(x, self.floor), self.weight)


def to_unit_norm(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / hypot(|x|, floor) over the last dimension, in fp32."""
    # Cast once: an operation on two dtypes would cast again by itself.
    wide = x.float()
    norm = vector_norm(wide, 2, -1, True).hypot_(floor)
    return wide / norm if wide is x else wide.div_(norm)


def norm_floor(eps: float, size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(math.sqrt(eps * size), dtype=torch.float32, device=device)


def folded_weight(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """In fp32, because one plus a small bf16 weight is not a bf16 number."""
    return (weight.float() + offset) * math.sqrt(weight.shape[-1])
