"""The specification of rotary in plain torch."""

from __future__ import annotations

import torch


def rotary_reference(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pagoda_kernels.rotary.rotary`."""
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
