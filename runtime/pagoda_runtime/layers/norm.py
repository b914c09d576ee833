"""Root mean square norm."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32, returned in x's dtype.

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
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def after_loading(self) -> None:
        # In fp32, because one plus a small bf16 weight is not a bf16 number.
        self.weight = self.weight.float() + self.weight_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., size]; weight: fp32, broadcast against x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    mean_square = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps)
    return (x * mean_square.rsqrt_()).mul_(weight).to(x.dtype)
