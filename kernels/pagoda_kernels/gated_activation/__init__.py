"""The activations of feed-forward layers, alone and as a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from pagoda_kernels.launch import uses_triton

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, where gate_up is [num_tokens, 2 * size]: gate, then up."""
    if uses_triton(gate_up.device):
        from pagoda_kernels.gated_activation.kernel import gated_activation_triton

        return gated_activation_triton(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)
