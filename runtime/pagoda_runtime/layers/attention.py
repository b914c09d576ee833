"""Self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_kernels.paged_attention import HeadNorm, Rotary
from pagoda_runtime.layers.linear import Linear
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.norm import folded_weight, make_weight, norm_floor
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Axis, Part


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """The heads of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def share(self, parallel: TensorParallel) -> AttentionHeads:
        """A rank's."""
        own, own_kv = parallel.share(self.num_heads), parallel.share(self.num_kv_heads)
        return AttentionHeads(len(own), len(own_kv), self.head_dim)

    def qkv_parts(self) -> list[Part]:
        """Of q, k and v, which are cut between heads."""
        counts = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        return [
            Part(f"{name}_proj", count * self.head_dim, num_heads=count)
            for name, count in counts.items()
        ]


class SelfAttention(Module):
    """q, k and v in one product; k and v go to the cache; the heads' results through o_proj.

    Args:
        layer: as the attention backend counts them.
        sees_all: whether a token attends to all earlier ones, and not to those of a window.
        biases: whether the first product has some, and the last.
        qk_norm: of the heads of q and k, if they have one.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: AttentionHeads,
        *,
        layer: int,
        sees_all: bool,
        biases: tuple[bool, bool],
        qk_norm: QKNorm | None,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.layer = layer
        qkv_bias, output_bias = biases
        self.qkv_proj = Linear(
            hidden_size, heads.qkv_parts(), cut=Axis.OUTPUT, bias=qkv_bias, placement=placement
        )
        self.o_proj = Linear(
            heads.num_heads * heads.head_dim,
            [Part("o_proj", hidden_size)],
            cut=Axis.INPUT,
            bias=output_bias,
            placement=placement,
        )
        self.qk_norm = qk_norm
        if sees_all:
            # q·k, and the sum of v.
            own = heads.share(placement.parallel)
            self.multiplications_per_earlier_token = 2 * own.num_heads * own.head_dim

    def __call__(self, x: torch.Tensor, rotary: Rotary, step: StepInput) -> torch.Tensor:
        """x: [num_tokens, hidden_size]"""
        norm = None if self.qk_norm is None else self.qk_norm.norm
        attended = step.attention.attend(self.layer, self.qkv_proj(x, step), rotary, norm)
        return self.o_proj(attended, step)


class QKNorm(Module):
    """The norms of q's and k's heads.

    Some dimensions of keys are ten times as large as others, and in 8 bits would leave these few
    steps. So k's weights are divided by powers of two that make them alike, and q's multiplied:
    q·k keeps its bits. Dimensions that are rotated together share one.

    Args:
        rotary_dim: the dimensions of a head that are rotated, its first ones.
    """

    def __init__(
        self,
        heads: AttentionHeads,
        *,
        rotary_dim: int,
        eps: float,
        weight_offset: float,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.weight_offset, self.rotary_dim = weight_offset, rotary_dim
        self.heads = heads.share(placement.parallel)
        parts = (Part(name, heads.head_dim) for name in ("q_norm", "k_norm"))
        self.parameters["weight"] = make_weight(placement, *parts)
        self.floor = norm_floor(eps, heads.head_dim, placement.device)

    def use_parameters(self) -> None:
        q_and_k = self.parameters["weight"].data.view(2, -1)
        q_norm, k_norm = folded_weight(q_and_k, self.weight_offset)
        sizes = _powers_of_two(k_norm, self.rotary_dim)
        q_norm, k_norm = q_norm * sizes, k_norm / sizes
        rows = [q_norm] * self.heads.num_heads + [k_norm] * self.heads.num_kv_heads
        self.norm = HeadNorm(torch.stack(rows), self.floor)


def _powers_of_two(weight: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """About how many times a usual one each weight of a head is; of a pair, the larger."""
    size = weight.abs()
    pairs = size[:rotary_dim].view(2, rotary_dim // 2)
    size = torch.cat((pairs.amax(0).repeat(2), size[rotary_dim:]))
    usual = size.median()
    # Of a weight of 0 nothing is left to scale.
    return torch.where(size > 0.0, size / usual, 1.0).log2().round().clamp(-8, 8).exp2()
