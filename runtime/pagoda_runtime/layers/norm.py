"""Root mean square norm."""

from __future__ import annotations

import math

import torch

from pagoda_kernels.rms_norm import add_rms_norm, rms_norm


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
        """x: [num_rows, size] fp32; the result has the model's dtype."""
        return rms_norm(x, self.weight, self.floor, self.dtype)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """total += norm(x); total is fp32, x has the model's dtype."""
        add_rms_norm(total, x, self.weight, self.floor)


def norm_floor(eps: float, size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(math.sqrt(eps * size), dtype=torch.float32, device=device)


def folded_weight(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """In fp32, because one plus a small bf16 weight is not a bf16 number."""
    return (weight.float() + offset) * math.sqrt(weight.shape[-1])
