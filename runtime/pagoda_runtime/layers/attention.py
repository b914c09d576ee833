"""Self-attention over the paged KV cache."""

from __future__ import annotations

import torch

from pagoda_kernels.paged_attention import HeadNorm, Rotary
from pagoda_runtime.layers.linear import Linear
from pagoda_runtime.layers.norm import folded_weight, norm_floor
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.config import ModelConfig


class SelfAttention:
    """q, k and v in one product; k and v go to the cache; the heads' results through o_proj."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layer = layer
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
        )
        self.o_proj = Linear(
            q_size,
            {"o_proj": config.hidden_size},
            bias=config.attention_output_bias,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
        )
        self.qk_norm: QKNorm | None = None
        if config.qk_norm:
            self.qk_norm = QKNorm(config, dtype=dtype, device=device)

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        targets = self.qkv_proj.targets(prefix) | self.o_proj.targets(prefix)
        if self.qk_norm is not None:
            targets |= self.qk_norm.targets(prefix)
        return targets

    def after_loading(self) -> None:
        self.qkv_proj.after_loading()
        self.o_proj.after_loading()
        if self.qk_norm is not None:
            self.qk_norm.after_loading()

    def fix_rows(self) -> None:
        self.qkv_proj.fix_rows()
        self.o_proj.fix_rows()

    def __call__(self, x: torch.Tensor, rotary: Rotary, step: StepInput) -> torch.Tensor:
        """x: [num_tokens, hidden_size]"""
        norm = None if self.qk_norm is None else self.qk_norm.norm
        return self.o_proj(step.attention.attend(self.layer, self.qkv_proj(x), rotary, norm))


class QKNorm:
    """The norms of q's and k's heads."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight_offset = config.norm_weight_offset
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.q_weight = torch.empty(config.head_dim, dtype=dtype, device=device)
        self.k_weight = torch.empty_like(self.q_weight)
        self.norm = HeadNorm(torch.empty(0), norm_floor(config.norm_eps, config.head_dim, device))

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}q_norm.weight": self.q_weight, f"{prefix}k_norm.weight": self.k_weight}

    def after_loading(self) -> None:
        rows = [self.q_weight] * self.num_heads + [self.k_weight] * self.num_kv_heads
        weight = folded_weight(torch.stack(rows), self.weight_offset)
        self.norm = HeadNorm(weight, self.norm.floor)
