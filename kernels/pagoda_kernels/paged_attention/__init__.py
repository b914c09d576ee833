"""Attend the query tokens of a step over their sequences' paged keys and values."""

from __future__ import annotations

from pagoda_kernels.launch import uses_triton
from pagoda_kernels.paged_attention.backend import (
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HeadNorm,
    Rotary,
)

__all__ = [
    "AttentionBackend",
    "AttentionPlan",
    "AttentionSpec",
    "HeadNorm",
    "Rotary",
    "make_backend",
]


def make_backend(spec: AttentionSpec) -> AttentionBackend:
    """The fastest for the spec's device. It is made at load, and is asked by every step."""
    # Implementations import the contract out of this package.
    if uses_triton(spec.device):
        from pagoda_kernels.paged_attention.triton_backend import TritonAttention

        return TritonAttention(spec)
    from pagoda_kernels.cpu.attention.backend import CpuAttention
    from pagoda_kernels.paged_attention.reference import ReferenceAttention

    return CpuAttention(spec) if spec.device.type == "cpu" else ReferenceAttention(spec)
