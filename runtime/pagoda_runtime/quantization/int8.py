"""An unquantized checkpoint's matrices, rounded to int8 as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pagoda_kernels.cpu.packed_linear import PackedLinear
from pagoda_kernels.cpu.panels import INT8_AS_BF16, has_panels
from pagoda_runtime.quantization.base import LinearMethod, Placement
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Layout, Parameter

_MAX = 127
# Numbers that are held in fp32 at once, beside the whole in int8.
_NUMBERS_AT_ONCE = 1 << 22


class Int8Linear(LinearMethod):
    """Whole numbers between -127 and 127 times a scale for each output; x stays in bf16."""

    @classmethod
    def unmet_need(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type == "cpu" and dtype is torch.bfloat16 and has_panels(INT8_AS_BF16):
            return None
        return "a CPU that multiplies bf16 (AVX512-bf16 and VBMI) and --dtype bfloat16"

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        weights: dict[str, Parameter] = {"weight": RoundedParameter(layout, self.placement)}
        if has_bias:
            weights["bias"] = self.placement.parameter(layout, OUTPUT)
        return weights

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        weight = weights["weight"]
        assert isinstance(weight, RoundedParameter)
        bias = weights["bias"].data if "bias" in weights else None
        self.product = PackedLinear(weight.data, bias, self.activation, scales=weight.scales)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class RoundedParameter(Parameter):
    """[outputs, inputs] int8 of a matrix that the checkpoint has in floating point."""

    def __init__(self, layout: Layout, placement: Placement) -> None:
        super().__init__(
            layout,
            (OUTPUT, INPUT),
            dtype=torch.int8,
            device=placement.device,
            parallel=placement.parallel,
        )
        self.scales = torch.empty(len(self.data), dtype=torch.float32, device=placement.device)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.scales.nbytes

    def store(self, target: tuple[slice, ...], tensor: torch.Tensor) -> None:
        rows = target[0]
        parts = (self.data[rows], self.scales[rows], tensor)
        rows_at_once = max(1, _NUMBERS_AT_ONCE // tensor.shape[1])
        for integers, scales, matrix in zip(
            *(part.split(rows_at_once) for part in parts), strict=True
        ):
            numbers = matrix.to(torch.float32, copy=True)
            largest = torch.amax(numbers.abs(), 1, out=scales)
            # A row of zeros stays one.
            largest.div_(_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
            integers.copy_(numbers.div_(scales[:, None]).round_())
