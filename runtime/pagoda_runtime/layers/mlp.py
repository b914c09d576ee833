"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pagoda_kernels.cpu.packed_linear import PackedGate as PackedGateMatrices
from pagoda_kernels.cpu.packed_linear import can_pack
from pagoda_runtime.layers.activation import ACTIVATIONS, gated_activation
from pagoda_runtime.layers.linear import FixedRowsLinear, Linear, PrepackedLinear, has_amx
from pagoda_runtime.models.config import ModelConfig


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        size, bias = config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate_up_proj = Linear(
            config.hidden_size,
            {"gate_proj": size, "up_proj": size},
            bias=bias,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
        )
        self.down_proj = Linear(
            size,
            {"down_proj": config.hidden_size},
            bias=bias,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
        )
        self.gate: Gate = MergedGate(self.gate_up_proj, self.activation)

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        return self.gate_up_proj.targets(prefix) | self.down_proj.targets(prefix)

    def after_loading(self) -> None:
        weight, quantization = self.gate_up_proj.weight, self.gate_up_proj.quantization
        if quantization is None and weight.dtype is torch.bfloat16 and has_amx(weight.device):
            self.gate = PrepackedGate(self.gate_up_proj, self.activation)
        elif can_pack(weight):
            self.gate = PackedGate(self.gate_up_proj, self.activation)
        else:
            self.gate_up_proj.after_loading()
        del self.gate_up_proj
        self.down_proj.after_loading()

    def fix_rows(self) -> None:
        self.gate.fix_rows()
        self.down_proj.fix_rows()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate(x))


class Gate(Protocol):
    """activation(gate(x)) * up(x)"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def fix_rows(self) -> None:
        """See `Decoder.fix_rows`."""


class MergedGate:
    """gate and up in one product."""

    def __init__(self, gate_up_proj: Linear, activation: str) -> None:
        self.gate_up_proj = gate_up_proj
        self.activation = ACTIVATIONS[activation]

    def fix_rows(self) -> None:
        self.gate_up_proj.fix_rows()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return gated_activation(self.gate_up_proj(x), self.activation)


class PackedGate:
    """Pagoda's own product that activates and multiplies at once; of a layer with gate, then up."""

    def __init__(self, gate_up_proj: Linear, activation: str) -> None:
        gate, up = gate_up_proj.weight.chunk(2)
        biases = () if gate_up_proj.bias is None else gate_up_proj.bias.chunk(2)
        is_int8 = gate_up_proj.quantization == "int8"
        self.matrices = PackedGateMatrices(gate, up, activation, *biases, is_int8=is_int8)

    def fix_rows(self) -> None:
        """A row's result does not depend on the other rows."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrices(x)


class PrepackedGate:
    """oneDNN's products that activate and multiply at once; of a layer with gate, then up."""

    def __init__(self, gate_up_proj: Linear, activation: str) -> None:
        gate, up = gate_up_proj.weight.chunk(2)
        biases = (None, None) if gate_up_proj.bias is None else gate_up_proj.bias.chunk(2)
        self.gate: Callable[..., torch.Tensor] = PrepackedLinear(
            gate, biases[0], activation=activation
        )
        self.up: Callable[..., torch.Tensor] = PrepackedLinear(up, biases[1])

    def fix_rows(self) -> None:
        self.gate, self.up = FixedRowsLinear(self.gate), FixedRowsLinear(self.up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x, self.gate(x))
